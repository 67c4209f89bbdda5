"""Fidelity on the pony: the metrics, sparsity between frames, and a budget that can be missed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from happyhorse_fast.cli import run
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, Sparsity, Tiles, TopK
from happyhorse_fast.pony import load_model
from happyhorse_fast.pony.generate import noise_and_text
from happyhorse_fast.pony.measure import Measured, largest_shift
from happyhorse_fast.pony.metrics import log_spectral_distance, psnr, ssim
from happyhorse_fast.verify import fidelity
from happyhorse_fast.verify.fidelity import ClipError, Fidelity, Policy, PolicyResult, Summary
from happyhorse_fast.verify.frame_blocks import decide_between_frames

torch.set_num_threads(1)

PROMPT = "a large red ball bounces twice"


# Metrics --------------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_square() -> None:
    a = torch.full((2, 3, 4, 4, 3), 0.5)
    b = a + torch.tensor([0.1, 0.0])[:, None, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20.0, 100.0])


def test_ssim_is_the_published_formula() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 1, 11, 11, 3), dtype=np.float32)
    place = np.arange(11) - 5
    weight = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))[:, :, None]
    weight /= weight.sum()
    x, y = a[0].astype(float), b[0].astype(float)
    mx, my = (weight * x).sum((0, 1)), (weight * y).sum((0, 1))
    vx, vy = (weight * (x - mx) ** 2).sum((0, 1)), (weight * (y - my) ** 2).sum((0, 1))
    cov = (weight * (x - mx) * (y - my)).sum((0, 1))
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert float(ssim(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(expected, abs=1e-5)


def test_ssim_falls_with_noise_and_with_a_shift() -> None:
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    equal, little, much = (float(ssim(picture, picture + level * noise)) for level in (0.0, 0.05, 0.3))
    assert equal == pytest.approx(1.0, abs=1e-6)
    assert 1 > little > much
    assert float(ssim(picture, picture.roll(3, dims=2))) < 0.2


def test_log_spectral_distance_is_the_change_of_level() -> None:
    sound = torch.randn(1, 24500, generator=torch.Generator().manual_seed(0))
    assert float(log_spectral_distance(sound, sound)) == 0
    assert float(log_spectral_distance(sound, 10**0.3 * sound)) == pytest.approx(6.0, abs=1e-3)


def test_impacts_are_compared_in_their_order() -> None:
    assert largest_shift([1.0, 5.0], [1.5, 4.0]) == 1.0
    assert largest_shift([], []) == 0.0
    assert largest_shift([1.0], []) is None
    silent = Measured("red", "large", "on the left", [], [], None)
    assert silent.sync_error is None and not silent.in_sync
    late = dataclasses.replace(silent, seen=[10.0, 30.0], heard=[10.0, 32.5])
    assert late.sync_error == 2.5 and not late.in_sync


# Sparsity between frames ----------------------------------------------------------------------------------------------


def velocities(sparsity: Sparsity | None, between_frames: bool) -> tuple[Any, torch.Tensor]:
    model: Any = load_model()
    accelerate(model, FastConfig(sparsity=sparsity, backend="reference", originals="drop"))
    if between_frames:
        decide_between_frames(model)
    with torch.no_grad():
        video, audio = model(*noise_and_text(PROMPT, torch.Generator().manual_seed(0)))
    return model, torch.cat([video.flatten(), audio.flatten()])


def test_masks_that_leave_nothing_out_come_back_as_they_were() -> None:
    _, plain = velocities(None, between_frames=False)
    _, everything = velocities(Tiles(13, 64, 64), between_frames=True)
    assert everything.equal(plain)
    _, some = velocities(Tiles(0, 64, 64), between_frames=True)
    assert (some - plain).norm() / plain.norm() > 0.05


def test_share_that_is_kept() -> None:
    # Frames within 1 of 13 are 37 of 169 pairs; the window of two layers of six, frames within 2, has 59.
    model, _ = velocities(Tiles(1, 64, 64), between_frames=True)
    assert fidelity.kept_share(model, 8) == pytest.approx(6 * 37 / (4 * 169 + 2 * 59))
    # Rows of 13 frames keep round(13 / 4) = 3; in the window, 3 to 5 frames wide, they keep 3 as well.
    model, _ = velocities(TopK(0.25), between_frames=True)
    assert fidelity.kept_share(model, 8) == pytest.approx(6 * 3 * 13 / (4 * 169 + 2 * 59))
    fast = model.fast.fast
    model.fast.fast = dataclasses.replace(fast, exact_first_steps=6)
    assert fidelity.kept_share(model, 8) == pytest.approx(0.75 + 0.25 * 6 * 3 * 13 / (4 * 169 + 2 * 59))
    # As a clip runs by itself: two blocks, of 128 and 80 tokens, of which every policy keeps at least one.
    model, _ = velocities(TopK(0.125), between_frames=False)
    assert 0.35 < fidelity.kept_share(model, 8) < 0.7


def test_codes_are_refused() -> None:
    model: Any = load_model()
    fast = FastConfig(precision="fp8", attention="fp8", sparsity=TopK(0.5), backend="reference", originals="drop")
    accelerate(model, fast)
    decide_between_frames(model)
    with pytest.raises(ValueError, match="attention must be bf16"):
        model(*noise_and_text(PROMPT, torch.Generator().manual_seed(0)))


# Policies -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Fidelity:
    names = ("eager bf16", "fast bf16", "all", "top-k 0.25")
    chosen = tuple(policy for policy in fidelity.policies() if policy.name in names)
    return fidelity.measure_fidelity(chosen, 1, steps=2)


def test_what_every_policy_costs(measured: Fidelity) -> None:
    eager, fast, fp8, sparse = (result.summary for result in measured.results)
    assert (measured.steps, measured.clips, len(measured.weights)) == (2, 1, 64)
    assert 0 < fast.video_error[0] <= 2 * eager.video_error[0] < fp8.video_error[0] < sparse.video_error[0]
    assert 100 > fast.psnr_db[0] > fp8.psnr_db[0] > sparse.psnr_db[0] > 15
    assert 1 > fast.ssim[0] > fp8.ssim[0] > sparse.ssim[0] > 0.5
    assert [result.kept < 1 for result in measured.results] == [False, False, False, True]
    assert list(fidelity.violations(measured)) == []


def test_every_policy_that_was_asked_for_is_measured() -> None:
    every = fidelity.policies()
    assert len({(p.kind, p.name) for p in every}) == len(every)
    for kind in ("int8", "fp8"):
        alone = [
            [op for op in ("qkv", "attention", "proj", "up", "down") if p.fast.precision_of(op, 0) != "bf16"]
            for p in every
            if p.kind == f"{kind} op" and p.fast is not None
        ]
        assert sorted(alone) == sorted([x] for x in ("qkv", "attention", "proj", "up", "down"))
    kinds = {p.kind for p in fidelity.policies(quick=True)}
    assert kinds == {"bf16", "int8", "fp8", "sparsity"}


def planted(found: Fidelity, kind: str, **changes: Any) -> Fidelity:
    """The same with one policy's numbers changed."""

    def change(result: PolicyResult) -> PolicyResult:
        if (result.kind, result.name) != (kind, "fast bf16" if kind == "bf16" else "all"):
            return result
        return dataclasses.replace(result, summary=dataclasses.replace(result.summary, **changes))

    return dataclasses.replace(found, results=tuple(map(change, found.results)))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bf16", {"audio_error": (0.5, 0.5)}, "fast bf16: median audio_error is 5.0e-01"),
        ("bf16", {"video_error": (float("nan"), 0.5)}, "fast bf16: median video_error is nan"),
        ("fp8", {"psnr_db": (29.0, 20.0)}, "fp8, all: median PSNR is 29.0 dB, at least 30 allowed"),
    ],
)
def test_a_planted_loss_is_named(measured: Fidelity, kind: str, changes: dict[str, Any], says: str) -> None:
    (violation,) = fidelity.violations(planted(measured, kind, **changes))
    assert says in violation


def test_the_command(measured: Fidelity, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[tuple[Policy, ...], int]] = []

    def remember(chosen: tuple[Policy, ...], clips: int, **_: Any) -> Fidelity:
        asked.append((chosen, clips))
        return measured

    monkeypatch.setattr(fidelity, "measure_fidelity", remember)
    assert run(["verify", "--pony", "--quick", "--clips", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] and data["pony"]["results"][0]["clips"][0]["prompt"].startswith("a ")
    assert asked == [(fidelity.policies(quick=True), 3)]
    assert "cases" not in data, "the recorded cases were not asked for"
    assert run(["verify", "--pony"]) == 0
    assert "1 of 1" in capsys.readouterr().out or measured.right == 0
    monkeypatch.setattr(fidelity, "measure_fidelity", lambda *_, **__: planted(measured, "fp8", psnr_db=(9.0, 9.0)))
    assert run(["verify", "--pony"]) == 1
    assert "median PSNR is 9.0 dB" in capsys.readouterr().out


def test_too_many_clips_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--pony", "--clips", "65"]) == 2
    assert "clips must be 1 to 64, got 65" in capsys.readouterr().err


def test_a_summary_counts_what_moved() -> None:
    still = ClipError("p", 50.0, 0.99, 0.1, 1.0, 0.5, 1.0, 0.01, 0.02, True)
    clips = (
        still,
        dataclasses.replace(still, heard_shift=0.625, psnr_db=30.0, right=False),
        dataclasses.replace(still, heard_shift=None, seen_shift=None, sync_error=None, sound_db=2.0),
    )
    summary = Summary.of(clips)
    assert (summary.moved, summary.seen_moved, summary.right, summary.clips) == (2, 1, 2, 3)
    assert summary.psnr_db == (50.0, 30.0) and summary.sound_db == (0.1, 2.0) and summary.sync_error == (1.0, 1.0)
