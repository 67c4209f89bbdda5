"""``sample``: recorded runs, both samplers by hand, noise, conditioning, progress; refusals: test_sampler_errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from toy_denoiser import CONFIG, Latents, Toy, clip, relative_l2, replay

from happyhorse_fast import golden
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.sampler import StepInfo, sample
from happyhorse_fast.sampler.distilled import noise_levels
from happyhorse_fast.sampler.progress import step_display
from happyhorse_fast.sampler.unipc import video_guidance

torch.set_num_threads(1)
RECORDED = ("dense_v2_fp32", "local_d128_fp32")
BUDGET = 1e-4
V, A, T = clip()
NULL = {"guidance": 5.0, "null_text": T}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Recorded runs of the public implementation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_noise_levels_are_the_recorded_ones(name: str) -> None:
    assert torch.equal(torch.tensor(noise_levels(8, 5.0)), golden.load_case(name).tensors["sampler.sigmas"])


@pytest.mark.parametrize("name", RECORDED)
def test_distilled_run_matches_the_recorded_one(name: str) -> None:
    case = golden.load_case(name)
    t, infos, drawn = case.tensors, [], []

    def noise(name: str, shape: torch.Size) -> torch.Tensor:
        drawn.append(name)
        return case.draw(name, shape)

    inputs = t["in.video"], t["in.audio"], t["in.text"]
    video, audio = sample(case.model(), *inputs, noise=noise, callback=infos.append, progress=False)
    errors = {
        "step0.video": relative_l2(infos[0].video, t["sampler.step0.video"]),
        "step0.audio": relative_l2(infos[0].audio, t["sampler.step0.audio"]),
        "final.video": relative_l2(video, t["sampler.final.video"]),
        "final.audio": relative_l2(audio, t["sampler.final.audio"]),
    }
    assert max(errors.values()) <= BUDGET, f"{name}: measured {errors}, allowed {BUDGET}"
    assert drawn == [f"noise.{m}.{i}" for i in range(7) for m in ("video", "audio")], "the last step adds no noise"


def test_a_wrong_shift_would_miss_the_budget() -> None:
    case = golden.load_case("dense_v2_fp32")
    t = case.tensors
    inputs = t["in.video"], t["in.audio"], t["in.text"]
    video, _ = sample(case.model(), *inputs, shift=5.01, noise=case.draw, progress=False)
    assert relative_l2(video, t["sampler.final.video"]) > BUDGET


# By hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift", "conditioned"), [(1, 5.0, False), (3, 1.0, True), (8, 5.0, True)])
def test_distilled_steps_by_hand(steps: int, shift: float, conditioned: bool) -> None:
    video, audio, text = clip()
    image = clip(1, t=1)[0] if conditioned else None
    got = sample(Toy(), video, audio, text, steps=steps, shift=shift, image=image, noise=replay, progress=False)
    model, v, a = Toy(), video.clone(), audio.clone()
    levels = [0.999 * (steps - i) / steps for i in range(steps + 1)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in levels]
    for i in range(steps):
        if image is not None:
            v[:, :, :1] = image
        dv, da = model(v, a, text)
        v, a = v - sigmas[i] * dv, a - sigmas[i] * da
        v = sigmas[i + 1] * replay(f"noise.video.{i}", v.shape) + (1 - sigmas[i + 1]) * v
        a = sigmas[i + 1] * replay(f"noise.audio.{i}", a.shape) + (1 - sigmas[i + 1]) * a
    if image is not None:
        v[:, :, :1] = image
    torch.testing.assert_close(got, (v, a), rtol=1e-5, atol=1e-6)


def guided_by_hand(
    model: Any,
    inputs: tuple[torch.Tensor, ...],
    null: torch.Tensor,
    steps: int,
    image: torch.Tensor | None,
    late: float,
) -> tuple[Latents, list[int]]:
    from diffusers import UniPCMultistepScheduler

    video, audio, text = (x.clone() for x in inputs)
    solvers = []
    for _ in range(2):
        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        solver.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
        solvers.append(solver)
    for t in solvers[0].timesteps:
        if image is not None:
            video[:, :, :1] = image
        (v1, a1), (v0, a0) = model(video, audio, text), model(video, audio, null)
        scale = 5.0 if t > 500 else late
        video = solvers[0].step(v0 + scale * (v1 - v0), t, video).prev_sample
        audio = solvers[1].step(a0 + 5.0 * (a1 - a0), t, audio).prev_sample
    if image is not None:
        video[:, :, :1] = image
    return (video, audio), solvers[0].timesteps.tolist()


@pytest.mark.parametrize(("steps", "conditioned"), [(32, False), (12, True)])
def test_guided_steps_are_diffusers_bit_for_bit(steps: int, conditioned: bool) -> None:
    model = HappyHorse(CONFIG, torch.float32).init_weights(3)
    inputs, null, image = clip(), clip(5, length=6)[2], clip(1, t=1)[0] if conditioned else None
    chosen = {} if steps == 32 else {"steps": steps}
    infos: list[StepInfo] = []
    got = sample(
        model, *inputs, guidance=5.0, null_text=null, image=image, callback=infos.append, progress=False, **chosen
    )
    with torch.no_grad():
        (video, audio), timesteps = guided_by_hand(model, inputs, null, steps, image, late=2.0)
        (unswitched, same_audio), _ = guided_by_hand(model, inputs, null, steps, image, late=5.0)
    assert len(infos) == steps
    assert "tensor(" not in repr(infos[0]), "a log line, not two latents in full"
    assert min(timesteps) <= 500 < max(timesteps), f"both scales must be used; timesteps {timesteps}"
    assert torch.equal(got[0], video) and torch.equal(got[1], audio)
    assert not torch.equal(got[0], unswitched), "the video's scale falls to 2 at t <= 500"
    assert not torch.equal(audio, same_audio), "and the audio follows the video through the model alone"


def test_guidance_switches_at_timestep_500() -> None:
    assert (video_guidance(5.0, 501), video_guidance(5.0, 500), video_guidance(3.0, 0)) == (5.0, 2.0, 2.0)
    # Velocity 1 with the text and 0 without is the scale itself, and moves a flow by (s' - s) * scale in any order.
    infos: list[StepInfo] = []
    model = Toy(change=lambda call, v, a: (torch.ones_like(v) * (call % 2), torch.ones_like(a) * (call % 2)))
    sample(model, *clip(), guidance=3.0, null_text=clip()[2], steps=20, callback=infos.append, progress=False)
    before, scales = clip()[:2], []
    for info, sigma in zip(infos, [*(following.sigma for following in infos[1:]), 0.0], strict=True):
        gap = sigma - info.sigma
        scales.append([float(((x - y) / gap).mean()) for x, y in zip((info.video, info.audio), before, strict=True)])
        before = (info.video, info.audio)
    early = sum(info.sigma * 1000 >= 501 for info in infos)
    assert 0 < early < 18
    assert [s[0] for s in scales[:early]] == pytest.approx([3.0] * early, rel=1e-3)
    # UniPC is of second order: the old scale is in the two steps after the switch.
    assert [s[0] for s in scales[early + 2 :]] == pytest.approx([2.0] * (20 - early - 2), rel=1e-2)
    assert [s[1] for s in scales] == pytest.approx([5.0] * 20, rel=1e-3), "audio keeps 5 at every step"


def test_more_guided_steps_than_distinct_timesteps() -> None:
    infos: list[StepInfo] = []
    video, audio, text = clip()
    sample(Toy(), video, audio, text, guidance=5.0, null_text=text, steps=260, callback=infos.append, progress=False)
    assert len(infos) == 260
    assert infos[0].sigma == pytest.approx(0.9998, abs=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_a_held_sound_is_seen_at_every_step_and_kept(guided: bool) -> None:
    (video, audio, text), how = clip(), NULL if guided else {}
    model, free = Toy(), Toy()
    got = sample(model, video, audio, text, steps=3, hold_audio=True, noise=replay, progress=False, **how)
    other = sample(free, video, audio, text, steps=3, noise=replay, progress=False, **how)
    assert torch.equal(got[1], audio) and not torch.equal(other[1], audio)
    assert all(torch.equal(heard, audio) for _, heard, _ in model.calls)
    assert not all(torch.equal(heard, audio) for _, heard, _ in free.calls)
    assert not torch.equal(got[0], other[0]), "the video follows the sound"


def test_a_held_sound_leaves_the_noise_of_the_video_as_it_is() -> None:
    video, audio, text = clip()
    drawn: dict[bool, list[str]] = {True: [], False: []}
    for held, names in drawn.items():

        def noise(name: str, shape: torch.Size, names: list[str] = names) -> torch.Tensor:
            names.append(name)
            return replay(name, shape)

        sample(Toy(), video, audio, text, steps=3, hold_audio=held, noise=noise, progress=False)
    assert drawn[True] == drawn[False] and len(drawn[True]) == 4


@pytest.mark.parametrize("guided", [False, True])
def test_image_is_seen_at_every_step_and_kept(guided: bool) -> None:
    video, audio, text = clip()
    image, model, infos = clip(1, t=1)[0], Toy(), []
    options = {"guidance": 5.0, "null_text": text} if guided else {}
    got, _ = sample(
        model, video, audio, text, steps=4, image=image, noise=replay, callback=infos.append, progress=False, **options
    )
    assert len(model.calls) == 4 * (1 + guided)
    assert all(torch.equal(seen[:, :, :1], image) for seen, _, _ in model.calls)
    assert torch.equal(model.calls[0][0][:, :, 1:], video[:, :, 1:])
    assert torch.equal(got[:, :, :1], image) and torch.equal(infos[-1].video, got)
    free, _ = sample(Toy(), video, audio, text, steps=4, noise=replay, progress=False, **options)
    assert not torch.equal(free[:, :, 1:], got[:, :, 1:]), "the other frames depend on the image"


# Noise ---------------------------------------------------------------------------------------------------------------


def test_noise_makes_a_run_repeatable() -> None:
    inputs = clip()

    def run(noise: Any) -> torch.Tensor:
        return torch.cat([x.flatten() for x in sample(Toy(), *inputs, noise=noise, progress=False)])

    assert torch.equal(run(seeded(1)), run(seeded(1)))
    assert not torch.equal(run(seeded(1)), run(seeded(2)))
    assert torch.equal(run(replay), run(replay))
    generator = seeded(1)
    assert torch.equal(run(lambda name, shape: torch.randn(shape, generator=generator)), run(seeded(1)))
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(5)
        first, other = run(None), run(None)
        torch.manual_seed(5)
        assert torch.equal(run(None), first)
        assert not torch.equal(first, other)
    finally:
        torch.random.set_rng_state(state)


# Properties ----------------------------------------------------------------------------------------------------------


@examples(30)
@given(
    shape=st.fixed_dictionaries(
        {"t": st.integers(1, 4), "h": st.sampled_from([2, 4]), "w": st.sampled_from([2, 6]), "a": st.integers(1, 5)}
    ),
    steps=st.integers(1, 5),
    shift=st.floats(0.1, 20),
    guided=st.booleans(),
    conditioned=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_clip_keeps_its_shape_and_its_inputs(
    shape: dict[str, int], steps: int, shift: float, guided: bool, conditioned: bool, dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype) for x in clip(3, **shape)]
    image = torch.ones_like(inputs[0][:, :, :1]) if conditioned else None
    options = {"steps": steps, "shift": shift, "image": image, "progress": False}
    if guided:
        options |= {"guidance": 4.0, "null_text": inputs[2]}
    kept = [x.clone() for x in inputs]
    runs = [sample(Toy(), *inputs, noise=seeded(9), **options) for _ in range(2)]
    for got, again, source in zip(*runs, inputs, strict=False):
        assert got.shape == source.shape and got.dtype == torch.float32
        assert torch.equal(got, again) and torch.isfinite(got).all()
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
    if image is not None:
        assert (runs[0][0][:, :, 0] == 1).all() and (image == 1).all()


@pytest.mark.parametrize("guided", [False, True])
def test_a_float64_model_keeps_float64_and_sees_the_same_noise(guided: bool) -> None:
    options = NULL if guided else {}
    runs = []
    for dtype in (torch.float32, torch.float64):
        model = HappyHorse(CONFIG, dtype).init_weights(3)
        runs.append(sample(model, V, A, T, steps=4, noise=seeded(4), progress=False, **options))
    for single, double in zip(*runs, strict=True):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        assert not torch.equal(double.float().double(), double)
        assert 0 < relative_l2(single, double) < 1e-5


@pytest.mark.parametrize("options", [{}, NULL], ids=["distilled", "guided"])
def test_velocities_in_bfloat16_are_combined_in_float32(options: dict[str, Any]) -> None:
    rounded = Toy(change=lambda call, v, a: (v.bfloat16(), a.bfloat16()))
    widened = Toy(change=lambda call, v, a: (v.bfloat16().float(), a.bfloat16().float()))
    got, expected = (sample(model, V, A, T, noise=replay, progress=False, **options) for model in (rounded, widened))
    for value, same in zip(got, expected, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, same)


# Progress ------------------------------------------------------------------------------------------------------------


def test_callback_gets_every_step() -> None:
    infos: list[StepInfo] = []
    kept: list[torch.Tensor] = []
    video, audio = sample(
        Toy(), V, A, T, progress=False, callback=lambda info: (infos.append(info), kept.append(info.video.clone()))
    )
    assert [(info.step, info.steps) for info in infos] == [(i, 8) for i in range(1, 9)]
    assert [info.sigma for info in infos] == noise_levels(8, 5.0)[:-1]
    assert all(info.seconds > 0 and info.memory_bytes is not None and info.memory_bytes > 2**20 for info in infos)
    assert torch.equal(infos[-1].video, video) and torch.equal(infos[-1].audio, audio)
    assert all(torch.equal(info.video, then) for info, then in zip(infos, kept, strict=True)), "no step is overwritten"
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos[0].step = 2  # type: ignore[misc]


def test_results_carry_no_graph_and_can_be_trained_on() -> None:
    video, _ = sample(HappyHorse(CONFIG, torch.float32).init_weights(1), V, A, T, steps=1, progress=False)
    assert not video.requires_grad
    weight = torch.ones((), requires_grad=True)
    (video * weight).sum().backward()
    assert weight.grad is not None and weight.grad == video.sum()


def test_progress_is_shown_on_stderr_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    sample(Toy(), V, A, T, progress=False)
    assert capsys.readouterr() == ("", "")
    sample(Toy(), V, A, T, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "distilled sampling" in err and "8/8" in err and "s/step" in err and "GiB" in err


def test_progress_leaves_out_memory_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    with step_display("run", 3, True) as show:
        show(StepInfo(2, 3, 0.5, 1.25, None, V, A))
    err = capsys.readouterr().err
    assert "2/3" in err and "1.25 s/step" in err and "peak" not in err
