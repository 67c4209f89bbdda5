"""What ``sample`` refuses, and what stops a run: every message names what came and what is allowed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from toy_denoiser import CONFIG, Latents, Toy, Velocity, clip

from happyhorse_fast.arguments import NonFiniteError
from happyhorse_fast.sampler import StepInfo, sample
from happyhorse_fast.sampler.noise import noise_source

torch.set_num_threads(1)
V, A, T = clip()
NULL = {"guidance": 5.0, "null_text": T}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"video": V[0]}, ValueError, "video must have 5 dimensions"),
    ({"video": V[:, :2]}, ValueError, "video must be of size 3 in dimension 1"),
    ({"video": V.int()}, TypeError, "video must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"video": V[:, :, :0]}, ValueError, "video must have at least 1 element in dimension 2"),
    ({"video": V[..., :5]}, ValueError, "video must have an even W"),
    ({"video": V.to("meta")}, ValueError, "video must be on device cpu.* got meta"),
    ({"video": V / 0}, NonFiniteError, "video must be finite"),
    ({"audio": A[..., :4]}, ValueError, "audio must be of size 5 in dimension 2"),
    ({"audio": None}, TypeError, "audio must be a tensor"),
    ({"text": T * torch.nan}, NonFiniteError, "text must be finite"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an integer.* got 2.0 of type float"),
    ({"steps": True}, TypeError, "steps must be an integer.* got True"),
    ({"shift": 0}, ValueError, "shift must be finite and more than 0, got 0"),
    ({"shift": float("nan")}, ValueError, "shift must be finite and more than 0, got nan"),
    ({"shift": "5"}, TypeError, "shift must be a number, got '5' of type str"),
    ({"image": V}, ValueError, "image must be of size 1 in dimension 2"),
    ({"image": V[:, :, :1, :2]}, ValueError, "image must be of size 4 in dimension 3"),
    ({"image": V[:, :, 0]}, ValueError, "image must have 5 dimensions"),
    ({"image": V[:, :, :1] / 0}, NonFiniteError, "image must be finite"),
    ({"callback": 3}, TypeError, "callback must be callable with a StepInfo, or None; got int"),
    ({"hold_audio": 1}, TypeError, "hold_audio must be True or False, got 1 of type int"),
    ({"guidance": 5.0}, ValueError, "guidance must come with null_text"),
    ({"null_text": T}, ValueError, "null_text must come with guidance"),
    (NULL | {"guidance": -1.0}, ValueError, "guidance must be finite and more than 0, got -1.0"),
    (NULL | {"guidance_audio": 0.0}, ValueError, "guidance_audio must be finite and more than 0"),
    (NULL | {"null_text": T[..., :3]}, ValueError, "null_text, in the place of text: .*size 7 in dimension 2"),
    (NULL | {"null_text": T / 0}, NonFiniteError, "null_text, in the place of text: text must be finite"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named_before_any_work(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, arguments = Toy(), {"video": V, "audio": A, "text": T, "progress": False} | change
    with pytest.raises(error, match=message):
        sample(model, **arguments)
    assert model.calls == []


def test_a_model_without_the_attributes_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"model must be callable .* got function, without config, device, stream_dtype"
    ):
        sample(lambda v, a, t: (v, a), V, A, T)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null_text, in the place of text: text must have at least 2 tokens"):
        sample(Toy(CONFIG.replace(coords_style="v1")), V, A, T, guidance=5.0, null_text=T[:, :1], progress=False)


def test_guidance_without_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    model = Toy()
    with pytest.raises(ImportError, match=r'pip install "happyhorse-fast\[base\]"'):
        sample(model, V, A, T, progress=False, **NULL)
    assert model.calls == []
    sample(model, V, A, T, progress=False)
    assert len(model.calls) == 8, "the distilled sampler needs none"


class ElsewhereGenerator(torch.Generator):
    """Stands for a generator of another device, which this machine may not have."""

    device = torch.device("cuda:7")


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (3, TypeError, r"noise must be a torch.Generator, a callable .* got int"),
        (lambda name, shape: torch.zeros(1, 2), ValueError, r'noise\("noise.video.0", \[1, 3, 2, 4, 6\]\)'),
        (lambda name, shape: torch.zeros(shape, dtype=torch.bfloat16), TypeError, r"must be torch.float32, got"),
        (lambda name, shape: torch.zeros(shape, dtype=torch.int64), TypeError, r"noise.video.0.* got torch.int64"),
        (lambda name, shape: torch.full(shape, torch.inf), NonFiniteError, r"noise.video.0.* 144 NaN or Inf"),
        (lambda name, shape: [0.0], TypeError, r"noise.video.0.* must be a tensor .* got list"),
        (ElsewhereGenerator(), ValueError, r"noise must be a generator on cpu, .* or on the CPU; got cuda:7"),
    ],
)
def test_bad_noise(noise: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(Toy(), *clip(), noise=noise, progress=False)


@pytest.mark.parametrize(("generator", "allowed"), [("cuda", True), ("cuda:0", True), ("cpu", True), ("cuda:1", False)])
def test_a_generator_made_for_a_gpu_without_an_index_serves_its_first(generator: str, allowed: bool) -> None:
    stand_in = type("", (torch.Generator,), {"device": torch.device(generator)})()
    if allowed:
        noise_source(stand_in, torch.device("cuda:0"), torch.float32)
        return
    with pytest.raises(ValueError, match="generator on cuda:0"):
        noise_source(stand_in, torch.device("cuda:0"), torch.float32)


def poison(modality: str, at: int, value: float) -> Velocity:
    def change(call: int, video: torch.Tensor, audio: torch.Tensor) -> Latents:
        if call == at:
            (video if modality == "video" else audio).view(-1)[3] = value
        return video, audio

    return change


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize(("guided", "at", "where"), [(False, 3, ""), (True, 5, ""), (True, 6, r" \(null_text\)")])
def test_non_finite_velocity_names_step_and_modality(
    value: float, modality: str, guided: bool, at: int, where: str
) -> None:
    video, audio, text = clip()
    model, infos = Toy(change=poison(modality, at, value)), []
    options = {"guidance": 5.0, "null_text": text} if guided else {}
    with pytest.raises(NonFiniteError, match=rf"^{modality} velocity at step 3 of 8{where} must be finite, got 1 NaN"):
        sample(model, video, audio, text, steps=8, callback=infos.append, progress=False, **options)
    assert len(model.calls) == at and [info.step for info in infos] == [1, 2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("guided", [False, True])
def test_a_raising_callback_stops_the_run(stop: type[BaseException], guided: bool) -> None:
    inputs = clip()
    kept, model, image = [x.clone() for x in inputs], Toy(), clip(1, t=1)[0]
    options = {"guidance": 5.0, "null_text": inputs[2]} if guided else {}

    def callback(info: StepInfo) -> None:
        if info.step == 2:
            raise stop("enough")

    with pytest.raises(stop, match="enough"):
        sample(model, *inputs, image=image, callback=callback, progress=True, **options)
    assert len(model.calls) == 2 * (1 + guided)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
    assert torch.equal(image, clip(1, t=1)[0])


def test_velocities_of_the_wrong_shape_or_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"video velocity at step 1 of 8 must be of size 2 in dimension 2"):
        sample(Toy(change=lambda call, v, a: (v[:, :, :1], a)), *clip(), progress=False)
    with pytest.raises(ValueError, match=r"audio velocity at step 1 of 8 must have 3 dimensions"):
        sample(Toy(change=lambda call, v, a: (v, a[0])), *clip(), progress=False)
    with pytest.raises(ValueError, match=r"video velocity at step 1 of 8 must be on device cpu, .* got meta"):
        sample(Toy(change=lambda call, v, a: (v.to("meta"), a)), *clip(), progress=False)
