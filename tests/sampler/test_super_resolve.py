"""``super_resolve``: the recorded second stage, step by step, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from toy_denoiser import clip, relative_l2, replay

from happyhorse_fast import golden
from happyhorse_fast.arguments import NonFiniteError
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.fast.memory import StorageMeter
from happyhorse_fast.sampler import StepInfo, super_resolve
from happyhorse_fast.sampler.super_resolve import signal_table
from happyhorse_fast.sampler.unipc import move_history, unipc_scheduler, unipc_step

torch.set_num_threads(1)
super_module = sys.modules["happyhorse_fast.sampler.super_resolve"]  # whose name in the package is the function's
CASE = "sr_v1_fp32"
FRESH = "HAPPYHORSE_FAST_FRESH_TEST"
"""Set in the interpreter of a test that has one of its own."""
BUDGET = 1e-4
CONFIG = ModelConfig(
    num_layers=1, hidden_size=8, head_dim=8, num_heads_q=1, num_heads_kv=1, video_in_channels=12, audio_in_channels=5,
    text_in_channels=7, coords_style="v1",
)  # fmt: skip


class Recorder:
    """Passes calls on to a model, or to a cheap formula, and keeps what it was called with."""

    device, stream_dtype = torch.device("cpu"), torch.float32

    def __init__(self, inner: Any = None, nan_in: str | None = None):
        self.inner, self.nan_in = inner, nan_in
        self.config = inner.config if inner is not None else CONFIG
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(tuple(x.clone() for x in inputs))
        if self.inner is not None:
            video, audio = self.inner(*inputs)
        else:
            video, audio = torch.tanh(inputs[0]) + inputs[1].mean() * inputs[2].std(), torch.sin(inputs[1])
        if self.nan_in is not None and len(self.calls) == 3:
            (video if self.nan_in == "video" else audio).view(-1)[0] = torch.nan
        return video, audio


V, A, T = clip(w=2)
SIZE = (6, 8)


def test_recorded_table_and_levels() -> None:
    t = golden.load_case(CASE).tensors
    error = relative_l2(signal_table(), t["sr.table"])
    assert error <= 1e-6, f"table: measured {error:.2e}"
    assert float(signal_table()[220]) == pytest.approx(0.83891, abs=5e-6)
    assert float(signal_table()[-1]) == 0 and signal_table().dtype == torch.float32
    solver = unipc_scheduler(5, 5.0)
    assert torch.equal(solver.sigmas, t["sr.sigmas"])
    assert torch.equal(solver.timesteps, t["sr.timesteps"])


def test_recorded_run() -> None:
    case = golden.load_case(CASE)
    t, model, drawn = case.tensors, Recorder(case.model()), []
    infos: list[StepInfo] = []

    def noise(name: str, shape: torch.Size) -> torch.Tensor:
        drawn.append((name, tuple(shape)))
        return case.draw(name, shape)

    inputs = t["in.base.video"], t["in.base.audio"], t["in.text"]
    height, width = t["sr.upsampled"].shape[3:]
    video = super_resolve(model, *inputs, (height, width), noise=noise, callback=infos.append, progress=False)
    clean = Recorder()
    clean.config = case.config
    super_resolve(clean, *inputs, (height, width), noise_index=0, steps=1, progress=False)
    errors = {
        "upsampled": relative_l2(clean.calls[0][0], t["sr.upsampled"]),
        "start.video": relative_l2(model.calls[0][0], t["sr.start.video"]),
        "start.audio": relative_l2(model.calls[0][1], t["sr.start.audio"]),
    } | {f"step{i}.video": relative_l2(info.video, t[f"sr.step{i}.video"]) for i, info in enumerate(infos)}
    assert len(errors) == 3 + 5
    assert max(errors.values()) <= BUDGET, f"measured {errors}, allowed {BUDGET}"
    assert torch.equal(video, infos[-1].video)
    assert all(torch.equal(audio, model.calls[0][1]) for _, audio, _ in model.calls), "audio stays as it was noised"
    assert drawn == [("noise.sr.video", t["sr.start.video"].shape), ("noise.sr.audio", t["sr.start.audio"].shape)]
    assert [info.sigma for info in infos] == t["sr.sigmas"][:-1].tolist()


def test_a_neighbouring_noise_index_would_miss_the_budget() -> None:
    case = golden.load_case(CASE)
    t = case.tensors
    inputs, size = (t["in.base.video"], t["in.base.audio"], t["in.text"]), tuple(t["sr.upsampled"].shape[3:])
    video = super_resolve(case.model(), *inputs, size, noise=case.draw, noise_index=221, progress=False)
    assert relative_l2(video, t["sr.step4.video"]) > BUDGET


def test_steps_are_diffusers_bit_for_bit() -> None:
    from diffusers import UniPCMultistepScheduler

    model, image, infos = Recorder(), torch.ones(1, 3, 1, *SIZE), []
    options = {"steps": 6, "shift": 3.0, "noise_index": 500, "audio_noise": 0.25, "image": image}
    got = super_resolve(model, V, A, T, SIZE, noise=replay, callback=infos.append, progress=False, **options)
    table = signal_table()[500]
    video = torch.nn.functional.interpolate(V, (2, *SIZE), mode="trilinear", align_corners=True)
    video = video * table + replay("noise.sr.video", video.shape) * (1 - table**2) ** 0.5
    audio = replay("noise.sr.audio", A.shape) * 0.25 + A * 0.75
    torch.testing.assert_close(model.calls[0][0][:, :, 1:], video[:, :, 1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.calls[0][1], audio, rtol=1e-6, atol=1e-6)
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    solver.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, 7)[:-1])
    video, audio, _ = model.calls[0]
    for t in solver.timesteps:
        video[:, :, :1] = image
        video = solver.step(Recorder()(video, audio, T)[0], t, video).prev_sample
    video[:, :, :1] = image
    assert torch.equal(got, video)
    assert all(torch.equal(seen[:, :, :1], image) for seen, _, _ in model.calls)
    assert all(torch.equal(info.audio, audio) for info in infos)


def run_alone(test: str) -> None:
    """A test of this file in an interpreter of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {FRESH: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test}"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pictured", [False, True])
def test_history_on_the_host_leaves_one_latent_and_the_same_result(pictured: bool, monkeypatch: Any) -> None:
    """What lives beside the model's activations is what decides whether 15 s at 1080p fit a card.

    In a process of its own: where a compiled function has raised, Dynamo's frames keep arguments until calls return.
    """
    if FRESH not in os.environ:
        run_alone(os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].removesuffix(" (call)"))
        return
    meter, parked, held = StorageMeter(), [], []

    class Metered(Recorder):
        def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            away = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in parked}
            held.append((meter.live_bytes - sum(away.values())) / inputs[0].nbytes)
            return torch.tanh(inputs[0]), torch.sin(inputs[1])  # the class above keeps what it is called with

    def park(solver: Any, device: torch.device) -> None:
        # Copies stand for the host's memory, where both are one.
        kept = [*solver.model_outputs, solver.last_sample]
        copies = [None if tensor is None else tensor.clone() for tensor in kept]
        solver.model_outputs, solver.last_sample = copies[:-1], copies[-1]
        parked[:] = [tensor for tensor in copies if tensor is not None] if device == super_module.HOST else []

    large = (96, 128)  # so that audio and text are nothing beside a latent
    how: dict[str, Any] = {"image": torch.ones(1, 3, 1, *large) if pictured else None, "progress": False}

    def run(history_on_host: bool) -> torch.Tensor:
        with meter:
            return super_resolve(Metered(), V, A, T, large, noise=replay, history_on_host=history_on_host, **how)

    whole = run(False).tolist()  # no tensor, which would count
    assert [round(count) for count in held] == [1, 3, 4, 4, 4]
    held.clear()
    monkeypatch.setattr(super_module, "move_history", park)
    monkeypatch.setattr(super_module, "HOST", torch.device("meta"))
    assert run(True).tolist() == whole
    assert [round(count) for count in held] == [1, 1, 1, 1, 1]


def test_history_is_on_the_host_but_for_a_steps_arithmetic(monkeypatch: Any) -> None:
    def run(**options: bool) -> torch.Tensor:
        model.calls.clear()
        return super_resolve(model, V, A, T, SIZE, noise=replay, progress=False, **options)

    model, places = Recorder(), []
    whole = run()
    host = torch.device("meta")
    monkeypatch.setattr(super_module, "HOST", host)
    monkeypatch.setattr(super_module, "move_history", lambda _, to: places.append((to == host, len(model.calls))))
    assert torch.equal(run(history_on_host=True), whole)
    assert places == [(on_host, step + 1) for step in range(5) for on_host in (False, True)]


def test_all_of_a_solvers_history_moves() -> None:
    solver = unipc_scheduler(4, 5.0)
    latent = torch.ones(1, 3, 1, 4, 4)
    for index in range(2):
        latent = unipc_step(solver, latent.sin(), index, latent)
    move_history(solver, torch.device("meta"))
    tensors = [value for value in vars(solver).values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for tensor in solver.model_outputs if tensor is not None]
    assert all(tensor.is_meta for tensor in tensors if tensor.shape == latent.shape)
    assert sum(tensor.is_meta for tensor in tensors) == 3


def test_generator_makes_a_run_repeatable() -> None:
    def run(seed: int) -> torch.Tensor:
        return super_resolve(Recorder(), V, A, T, SIZE, noise=torch.Generator().manual_seed(seed), progress=False)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_noise_of_no_weight_is_not_drawn() -> None:
    drawn: list[str] = []

    def noise(name: str, shape: torch.Size) -> torch.Tensor:
        drawn.append(name)
        return replay(name, shape)

    model = Recorder()
    super_resolve(model, V, A, T, (4, 2), noise=noise, noise_index=0, audio_noise=0.0, progress=False)
    assert drawn == []
    torch.testing.assert_close(model.calls[0], (V, A, T))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_non_finite_velocity_names_step_and_modality(modality: str) -> None:
    model = Recorder(nan_in=modality)
    with pytest.raises(NonFiniteError, match=f"^{modality} velocity at step 3 of 5 must be finite, got 1 NaN or Inf"):
        super_resolve(model, V, A, T, SIZE, progress=False)
    assert len(model.calls) == 3


def test_ctrl_c_in_a_callback_ends_the_run_and_leaves_the_inputs() -> None:
    kept, model = [x.clone() for x in (V, A, T)], Recorder()

    def callback(info: StepInfo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        super_resolve(model, V, A, T, SIZE, callback=callback, progress=True)
    assert len(model.calls) == 1
    assert all(torch.equal(x, y) for x, y in zip((V, A, T), kept, strict=True))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"size": (6, 7)}, ValueError, r"W of size must be a multiple of 2 .* got \(6, 7\)"),
    ({"size": (2, 8)}, ValueError, "H of size, in latent positions, must be at least 4, got 2"),
    ({"size": (6.0, 8)}, TypeError, "H of size, in latent positions, must be an integer"),
    ({"size": 8}, TypeError, r"size must be \(H, W\), latent rows and columns, got 8"),
    ({"size": (2, 6, 8)}, TypeError, r"size must be \(H, W\), latent rows and columns, got \(2, 6, 8\)"),
    ({"video": V[0]}, ValueError, "video must have 5 dimensions"),
    ({"video": V * torch.nan}, NonFiniteError, "video must be finite"),
    ({"audio": A / 0}, NonFiniteError, "audio must be finite"),
    ({"text": T / 0}, NonFiniteError, "text must be finite"),
    ({"text": T[:, :1]}, ValueError, "text must have at least 2 tokens"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"shift": -1}, ValueError, "shift must be finite and more than 0, got -1"),
    ({"noise_index": 1000}, ValueError, "noise_index must be from 0 to 999, got 1000"),
    ({"noise_index": 0.5}, TypeError, "noise_index must be an integer, from 0 to 999; got 0.5"),
    ({"audio_noise": 1.5}, ValueError, "audio_noise must be from 0 to 1, got 1.5"),
    ({"audio_noise": float("nan")}, ValueError, "audio_noise must be from 0 to 1, got nan"),
    ({"image": V[:, :, :1]}, ValueError, "image must be of size 6 in dimension 3"),
    ({"callback": "x"}, TypeError, "callback must be callable with a StepInfo, or None; got str"),
    ({"noise": 3}, TypeError, "noise must be a torch.Generator, a callable"),
    ({"noise": lambda name, shape: torch.zeros(2)}, ValueError, r'noise\("noise.sr.video", \[1, 3, 2, 6, 8\]\)'),
    ({"sr_model": len}, TypeError, "sr_model must be callable and have the attributes config"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named_before_any_work(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Recorder()
    arguments = {"sr_model": model, "video": V, "audio": A, "text": T, "size": SIZE, "progress": False} | change
    with pytest.raises(error, match=message):
        super_resolve(**arguments)
    assert model.calls == []


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    model = Recorder()
    with pytest.raises(ImportError, match=r'pip install "happyhorse-fast\[base\]"'):
        super_resolve(model, V, A, T, SIZE, progress=False)
    assert model.calls == []


@examples(25)
@given(
    shape=st.fixed_dictionaries(
        {"t": st.integers(1, 4), "h": st.sampled_from([2, 4]), "w": st.sampled_from([2, 6]), "a": st.integers(2, 5)}
    ),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    steps=st.integers(1, 6),
    noise_index=st.integers(0, 999),
    audio_noise=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_clip_gets_the_size_asked_for(
    shape: dict[str, int],
    more: tuple[int, int],
    steps: int,
    noise_index: int,
    audio_noise: float,
    dtype: torch.dtype,
) -> None:
    inputs = [x.to(dtype) for x in clip(**shape)]
    kept = [x.clone() for x in inputs]
    size = (shape["h"] + 2 * more[0], shape["w"] + 2 * more[1])
    options = {"steps": steps, "noise_index": noise_index, "audio_noise": audio_noise, "progress": False}
    got, again = (
        super_resolve(Recorder(), *inputs, size, noise=torch.Generator().manual_seed(2), **options) for _ in range(2)
    )
    assert got.shape == (1, 3, shape["t"], *size) and got.dtype == torch.float32
    assert torch.equal(got, again) and torch.isfinite(got).all()
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
