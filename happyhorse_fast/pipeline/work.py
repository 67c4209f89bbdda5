"""Predicted seconds of each stage: what the time that is left is counted by, until the stages themselves say better."""

from __future__ import annotations

from pathlib import Path

from happyhorse_fast.costs import gpu_named, step_costs, totals
from happyhorse_fast.fast.config import default_attention
from happyhorse_fast.pipeline import stages, tiling
from happyhorse_fast.pipeline.latents import DENOISED, RESOLVED
from happyhorse_fast.pipeline.parts import DECODERS, Parts
from happyhorse_fast.pipeline.progress import Work
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.sampler.distilled import DISTILLED_STEPS
from happyhorse_fast.sampler.guided import GUIDED_STEPS
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens

DISK = 2e9
"""Bytes a second that a part is read with, of a local NVMe disk."""
SECOND_STEPS = 5
DECODE_FLOPS = {"turbo": 3.4e9, "wan": 18.4e9}
"""Per latent position (docs/DECODER.md)."""
DECODE_RATE = 4e14
"""FLOP/s of convolutions in bf16, 40 % of an H100's peak."""
SMALL = Work(load=0.5, compute=0.5)
"""Of a stage that is not worth a formula."""


def predicted(parts: Parts, request: Request, names: list[str]) -> dict[str, Work]:
    """Seconds on an H100 of each of a run's stages."""
    first, last = request.first_tokens, request.last_tokens
    evaluations = DISTILLED_STEPS if request.first == "distilled" else 2 * GUIDED_STEPS
    found = {}
    for name in names:
        if name == DENOISED:
            found[name] = _denoising(parts, request.models[0], first, evaluations)
        elif name == RESOLVED:
            found[name] = _denoising(parts, request.models[1], last, SECOND_STEPS)
        elif name == stages.VIDEO:
            count = last.T
            if parts.decoder == "turbo":
                count = sum(window.stop - window.start for window in tiling.time_windows(last.T))
            compute = count * last.H * last.W * DECODE_FLOPS[parts.decoder] / DECODE_RATE
            found[name] = Work(_read_seconds(parts.layout.find(DECODERS[parts.decoder])), compute)
        elif name == stages.TEXT and parts.layout.there("text_encoder"):
            found[name] = Work(_read_seconds(parts.layout.find("text_encoder")) / 2, SMALL.compute)  # half is a decoder
        else:
            found[name] = SMALL
    return found


def _denoising(parts: Parts, name: str, tokens: ClipTokens, evaluations: int) -> Work:
    precision = "bf16" if parts.fast is None else parts.fast.precision
    attention = default_attention(precision) if parts.fast is None else parts.fast.attention_format
    costs = step_costs(
        parts.config(name), tokens, text=TEXT_TOKENS, gpu=gpu_named("h100"), precision=precision, attention=attention
    )
    compute = 2 * evaluations * totals(costs).floor_ms / 1e3
    return Work(_read_seconds(parts.layout.find(name)), compute)


def _read_seconds(folder: Path) -> float:
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / DISK
