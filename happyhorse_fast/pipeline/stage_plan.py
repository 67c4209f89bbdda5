"""What each stage of the whole path takes: weights, peak memory, and the least time on a card.

Peaks of the Transformers and of the turbo decoder are traced under fake tensors, as ``fast/memory.py`` does. Those of
the libraries' parts grow in proportion with pixels, or with audio latents; the factors are of traces of these parts at
their published sizes (transformers 5.24, diffusers 0.42), and the tests hold them against the libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.config import LATENT_CHANNELS, ModelConfig
from happyhorse_fast.costs import GPUS, Gpu, step_costs, totals
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import empty_accelerated
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision
from happyhorse_fast.fast.memory import StorageMeter, fake_copy, peak_by_kind, weight_bytes
from happyhorse_fast.ops.runtime.dispatch import choose
from happyhorse_fast.pipeline import tiling
from happyhorse_fast.pipeline.request import AUDIO, DENOISED, IMAGE, RESOLVED, SOUND, TEXT, VIDEO, Request
from happyhorse_fast.pipeline.turbo import TurboDecoder
from happyhorse_fast.sampler.distilled import DISTILLED_STEPS
from happyhorse_fast.sampler.unipc import GUIDED_STEPS
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens

TEXT_LAYERS = 42
TEXT_LAYER_BYTES = 396_390_400
"""A layer of the published encoder in bf16; the embedding stays in its file."""
TEXT_ROW_BYTES = 120_000
"""Activations per token, in bf16: at the peak three of the MLP's width, 14,336."""
WAN_ENCODER_BYTES, WAN_ENCODER_PIXEL = 299_278_880, 984
"""Weights of the half in bf16, and its activations per pixel of one frame."""
WAN_DECODER_BYTES, WAN_DECODER_PIXEL = 1_110_121_784, 11_000
"""Likewise, decoding latent by latent."""
AUDIO_HALF_BYTES = 312_500_000
"""Weights of either half of the audio codec in float32; its weight norm makes them once more, and keeps them."""
AUDIO_DECODER_LATENT, AUDIO_ENCODER_LATENT = 4_720_000, 5_280_000
"""Activations per audio latent."""
WAN_ENCODER_FLOPS, AUDIO_FLOPS = 4.65e6, 5.05e9
"""Per pixel; per audio latent, either way."""
DECODER_FLOPS = {"turbo": 3.4e9, "wan": 18.5e9}
"""Per position of a latent that is decoded (docs/DECODER.md)."""
HELD_LATENTS = {"distilled": 1, "base": 5, "second": 3}
"""Latents beside the model's input while it runs: the start, the solvers' history, a guided step's first velocity."""
SECOND_STEPS = 5
FRAMES_BYTES = 28 * 3
"""Of a pixel: a window's frames as bytes, which leave while the next window is decoded."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of the whole path.

    Attributes:
        name: As a run names it.
        part: What it loads.
        weight_bytes: Of the part on the device.
        peak_bytes: Of the stage where it has the device to itself, weights included.
        floor_s: Least seconds for its products and bytes on the card; loading is not in it.
    """

    name: str
    part: str
    weight_bytes: int
    peak_bytes: int
    floor_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does, and how.

    Attributes:
        request: Its settings.
        models: Configurations of the request's models, in order.
        precision: Of the models' products; None for eager torch in bf16.
        attention: Of their attention; None for its default.
        decoder: ``"turbo"`` or ``"wan"``.
        text: Tokens of the prompt.
        gpu: Card whose peaks make the floors.
    """

    request: Request
    models: tuple[ModelConfig, ...]
    precision: Precision | None = "fp8"
    attention: AttentionPrecision | None = None
    decoder: Literal["turbo", "wan"] = "turbo"
    text: int = TEXT_TOKENS
    gpu: Gpu = GPUS["h100"]

    @property
    def fast(self) -> FastConfig | None:
        """How the models are accelerated; None for eager torch in bf16."""
        return None if self.precision is None else FastConfig(precision=self.precision, attention=self.attention)


def stage_plans(
    work: Work,
    *,
    tiles: int = 1,
    layers_on_device: int | None = None,
    history_on_host: bool = False,
    traced: bool = True,
) -> tuple[StagePlan, ...]:
    """Each stage of a run, in order.

    Args:
        work: What is to be done.
        tiles: Of the turbo decoder.
        layers_on_device: Of the text encoder; None for all.
        history_on_host: Of :func:`~happyhorse_fast.sampler.super_resolve`.
        traced: Whether to trace peaks, which takes a second or two; else those of models and decoder are of no meaning.
    """
    stages = [text_stage(work, layers_on_device)]
    if work.request.image:
        stages.append(_image(work))
    if work.request.sound:
        stages.append(_sound(work, SOUND, AUDIO_ENCODER_LATENT, 1))
    stages.append(_denoise(work, DENOISED, HELD_LATENTS[work.request.first], traced))
    if len(work.models) > 1:
        stages.append(_denoise(work, RESOLVED, 0 if history_on_host else HELD_LATENTS["second"], traced))
    stages.append(_sound(work, AUDIO, AUDIO_DECODER_LATENT, 2))
    stages.append(video_stage(work, tiles, traced))
    return tuple(stages)


def text_stage(work: Work, layers_on_device: int | None) -> StagePlan:
    """The text encoder, with so many of its layers on the device; None for all."""
    # One more than stay: a layer that is read when it is needed.
    there = TEXT_LAYERS if layers_on_device is None else min(TEXT_LAYERS, layers_on_device + 1)
    weights = there * TEXT_LAYER_BYTES
    flops = work.text * TEXT_LAYERS * TEXT_LAYER_BYTES  # two per weight of two bytes
    floor = max(flops / work.gpu.rate("bf16"), TEXT_LAYERS * TEXT_LAYER_BYTES / (work.gpu.bandwidth * 1e12))
    return StagePlan(TEXT, work.request.parts[TEXT], weights, weights + TEXT_ROW_BYTES * work.text, floor)


def _image(work: Work) -> StagePlan:
    sizes = {clip.pixels for clip in (work.request.first_tokens, work.request.last_tokens)}
    pixels = [height * width for height, width in sizes]
    floor = sum(pixels) * WAN_ENCODER_FLOPS / work.gpu.rate("bf16")
    peak = WAN_ENCODER_BYTES + WAN_ENCODER_PIXEL * max(pixels)
    return StagePlan(IMAGE, work.request.parts[IMAGE], WAN_ENCODER_BYTES, peak, floor)


def _sound(work: Work, name: str, per_latent: int, copies: int) -> StagePlan:
    latents = work.request.audio_tokens
    peak = copies * AUDIO_HALF_BYTES + per_latent * latents
    floor = latents * AUDIO_FLOPS / work.gpu.rate("fp32")
    return StagePlan(name, work.request.parts[name], 2 * AUDIO_HALF_BYTES, peak, floor)


def _denoise(work: Work, name: str, held: int, traced: bool) -> StagePlan:
    if name == DENOISED:
        config, clip = work.models[0], work.request.first_tokens
        evaluations = DISTILLED_STEPS if work.request.first == "distilled" else 2 * GUIDED_STEPS
    else:
        config, clip, evaluations = work.models[1], work.request.last_tokens, SECOND_STEPS
    attention = "bf16" if work.fast is None else work.fast.attention_format
    costs = step_costs(
        config, clip, text=work.text, precision=work.precision or "bf16", attention=attention, gpu=work.gpu
    )
    weights = peak = loading = 0
    if traced:
        weights, peak, loading = _model_bytes(config, clip, work.text, work.fast)
    peak += held * 4 * config.latent_channels * clip.T * clip.H * clip.W
    floor = evaluations * totals(costs)["floor_ms_per_step"] / 1e3
    return StagePlan(name, work.request.parts[name], weights, max(peak, loading), floor)


@lru_cache(maxsize=32)
def _model_bytes(config: ModelConfig, clip: ClipTokens, text: int, fast: FastConfig | None) -> tuple[int, int, int]:
    """Of a model: weights, peak of an evaluation, peak of loading: all but the largest layer packed, that one not."""

    def build(wanted: ModelConfig) -> torch.nn.Module:
        if fast is None:
            return HappyHorse(wanted, device="meta")
        choices = choose("reference", fast.precision, torch.device("cpu"), attention=fast.attention_format)
        return empty_accelerated(wanted, fast, choices)

    weights = weight_bytes(build(config))
    layers = HappyHorse(config, device="meta").block.layers
    largest = max(weight_bytes(layer) for layer in layers)
    return weights, peak_by_kind(config, clip, build, text=text), weights + (0 if fast is None else largest)


def video_stage(work: Work, tiles: int, traced: bool = True) -> StagePlan:
    """The video decoder, with frames in so many tiles; ``traced`` as for :func:`stage_plans`."""
    clip = work.request.last_tokens
    height, width = clip.pixels
    pixels = height * width
    positions = clip.T * clip.H * clip.W
    latents = 4 * LATENT_CHANNELS * positions
    if work.decoder == "wan":
        weights, peak = WAN_DECODER_BYTES, WAN_DECODER_BYTES + WAN_DECODER_PIXEL * pixels
    else:
        weights, peak = _turbo_bytes(clip.T, clip.H, clip.W, tiles) if traced else (0, 0)
        windows = sum(window.stop - window.start for window in tiling.time_windows(clip.T))
        positions = windows * sum(map(tiling.positions, tiling.space_tiles(clip.H, clip.W, tiles)))  # halos included
    peak += latents + FRAMES_BYTES * pixels
    floor = positions * DECODER_FLOPS[work.decoder] / work.gpu.rate("bf16")
    return StagePlan(VIDEO, work.request.parts[VIDEO], weights, peak, floor)


@lru_cache(maxsize=32)
def _turbo_bytes(count: int, height: int, width: int, tiles: int) -> tuple[int, int]:
    """Of the published turbo decoder: weights, and the peak of its largest window, the latents of a clip included."""
    decoder = TurboDecoder([512, 512, 256, 128, 64], [3, 3, 2, 2, 2]).to(torch.bfloat16).requires_grad_(False)
    window = max(tiling.time_windows(count), key=lambda one: one.stop - one.start)
    meter = StorageMeter()
    with FakeTensorMode():
        fake = fake_copy(decoder)
        weights = meter.register(fake.parameters(), "weights")
        latents = torch.empty(count, height, width, LATENT_CHANNELS, dtype=torch.bfloat16, device="cpu")
        meter.register([latents], "latents")
        largest = max(tiling.space_tiles(height, width, tiles), key=tiling.positions)
        with meter:
            fake._window(latents, window, [largest])
    return weights, meter.peak_bytes
