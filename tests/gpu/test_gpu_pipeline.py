"""From a prompt to a clip on a GPU, with tiny random parts: placements, noise, and a run that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, MARKS
from logged import logs

from happyhorse_fast import optional, tokens
from happyhorse_fast.ops.runtime.cache_folder import cache_folder
from happyhorse_fast.pipeline import parts
from happyhorse_fast.pipeline.pipeline import Pipeline
from happyhorse_fast.pipeline.tiny import write_tiny_checkpoint

pytestmark = MARKS
PROMPT = "a red ball bounces"
HOW: dict[str, Any] = {"seconds": 3, "resolution": "540p", "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [why for name in ("transformers", "diffusers") if (why := optional.obstacle(name))]:
        pytest.skip("; ".join(missing))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokens, "SIDES", {"256p": (64, 96), "540p": (96, 160)})
    # Without prompts that were encoded before; kernels need no second check.
    checked = cache_folder() / "self_check.json"
    monkeypatch.setenv("HAPPYHORSE_FAST_CACHE", str(tmp_path / "cache"))
    if checked.exists():
        shutil.copy(checked, cache_folder())


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_every_placement_gives_the_same_clip(tiny: Path, precision: Any) -> None:
    if precision == "fp8" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    clips = []
    for placement in ("sequential", "resident", "auto"):
        pipe = Pipeline.from_pretrained(tiny, precision=precision, placement=placement, device=DEVICE)  # type: ignore[arg-type]
        clips.append(pipe(PROMPT, **HOW))
        del pipe
    assert (clips[-1].placing.placement == "resident") == (DEVICE.type == "cuda"), "the tiny parts fit"
    for clip in clips[1:]:
        assert torch.equal(clip.latents.video, clips[0].latents.video)
        assert torch.equal(clip.samples, clips[0].samples) and torch.equal(clip.frames, clips[0].frames)
    for cost in clips[0].stages:
        assert cost.peak_bytes is not None and 0 < cost.peak_bytes < 4 << 30


def test_parts_come_back_from_the_host_as_they_were(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(tiny, precision="bf16", placement="sequential", device=DEVICE)
    first = pipe(PROMPT, **HOW)
    assert pipe.parts.residency.held == ()
    monkeypatch.setattr(parts, "load", lambda *_, **how: pytest.fail("a model is read again"))
    second = pipe(PROMPT, **HOW)
    assert torch.equal(first.latents.video, second.latents.video) and torch.equal(first.samples, second.samples)


def test_a_cpu_and_a_gpu_draw_the_same_noise_where_it_is_asked_for(tiny: Path) -> None:
    videos = []
    for device in (torch.device("cpu"), DEVICE):
        pipe = Pipeline.from_pretrained(tiny, precision=None, device=device)
        videos.append(pipe(PROMPT, **HOW, stages=1, noise="cpu").latents.video)
    # Eight steps in bf16 on two devices; with other noise the relative distance is about 1.4.
    assert float((videos[0] - videos[1]).norm() / videos[0].norm()) < 0.1


def test_a_run_goes_on_from_its_latents_with_the_noise_of_the_device(tiny: Path, tmp_path: Path) -> None:
    def stop(info: Any) -> None:
        if info.stage == "super-resolve":
            raise KeyboardInterrupt

    pipe = Pipeline.from_pretrained(tiny, precision="bf16", device=DEVICE)
    kept = tmp_path / "x.safetensors"
    with logs("resume goes on"), pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, **HOW, latents=kept, callback=stop)
    assert torch.equal(pipe(resume=kept, progress=False).latents.video, pipe(PROMPT, **HOW).latents.video)
