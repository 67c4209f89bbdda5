"""Frames that leave the GPU while the next are decoded are whole when they are handed on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, DRY, MARKS
from safetensors.torch import load_file

from happyhorse_fast.pipeline import TurboDecoder, to_uint8
from happyhorse_fast.pipeline.host_frames import host_frames

pytestmark = MARKS
RECORDED = load_file(Path(__file__).parents[1] / "pipeline" / "turbo_tiny_fp32.safetensors")


@pytest.mark.parametrize("tiles", [1, 4])
def test_frames_arrive_as_they_were_decoded(tiles: int) -> None:
    weights = {k: w.to(DEVICE, torch.bfloat16) for k, w in RECORDED.items() if k.startswith("decoder.")}
    decoder = TurboDecoder.from_tensors(weights)
    size = (9, 4, 4) if DRY else (16, 68, 120)
    latents = torch.randn(1, 48, *size, device=DEVICE)
    arrived = list(host_frames(decoder, latents, tiles))
    assert all(frames.device.type == "cpu" for frames in arrived)
    assert DEVICE.type == "cpu" or all(frames.is_pinned() for frames in arrived)
    for frames, window in zip(arrived, decoder.windows(latents, tiles), strict=True):
        wanted = to_uint8(window)[0].permute(1, 2, 3, 0).cpu()
        # A step or two apart where a sum was taken in another order; what had not arrived would be anything.
        assert (frames.int() - wanted.int()).abs().max() <= 2
