"""Measure the ranges of a model's activations, and their rounding to e4m3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from happyhorse_fast.eager.model import HappyHorse, Layer, normed
from happyhorse_fast.eager.sequence import row_chunks
from happyhorse_fast.ops.attention.reference import output_scale
from happyhorse_fast.ops.linear.contract import static_scale
from happyhorse_fast.ops.qkv.packing import static_qk_scale
from happyhorse_fast.ops.qkv.reference import quantize_v
from happyhorse_fast.ops.quantize import E4M3_MAX, e4m3_rows, to_e4m3
from happyhorse_fast.pony import generate
from happyhorse_fast.verify.layer_ops import LayerInputs, OpResults, before_layers, eager_ops

TENSORS = ("residual", "qkv input", "q", "k", "v", "proj input", "up input", "down input")
"""Tensors of a layer that are measured; all but the residual stream become e4m3 in fp8."""
MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class ActivationRange:
    """Range of one tensor of one layer over all denoising steps of a clip.

    Attributes:
        layer: Layer number.
        tensor: One of :data:`TENSORS`.
        modality: ``"video"`` or ``"audio"``, whose rows these are.
        amax: Largest magnitude.
        rms: Root mean square.
        kurtosis: E[x^4] / E[x^2]^2: 3 for normal values, larger with outliers.
        outlier: amax / rms.
        channel: RMS of the loudest channel over that of the median channel; one scale per row cannot follow it.
        saturated: Share past the largest code under the scale that the op uses; None for the residual stream.
        lost: Share of the values other than zero that become zero; None likewise.
        error: Relative L2 of rounding to codes; None likewise.
    """

    layer: int
    tensor: str
    modality: str
    amax: float
    rms: float
    kurtosis: float
    outlier: float
    channel: float
    saturated: float | None
    lost: float | None
    error: float | None


class Sums:
    """Moments of one tensor, added up step by step in float64."""

    def __init__(self) -> None:
        self.amax = self.square = self.fourth = self.count = 0.0
        self.channels: torch.Tensor | None = None
        self.saturated = self.lost = self.live = self.error = 0.0

    def add(self, x: torch.Tensor, scaled: torch.Tensor | None) -> None:
        """Add values [rows, channels]; ``scaled`` is the same divided by its scales, before the cast."""
        x = x.double()
        self.amax = max(self.amax, float(x.abs().max()))
        self.square += float(x.square().sum())
        self.fourth += float(x.pow(4).sum())
        self.count += x.numel()
        squares = x.square().sum(dim=0)
        self.channels = squares if self.channels is None else self.channels + squares
        if scaled is None:
            return
        codes = to_e4m3(scaled).double()
        # Within half a step of 448 is rounding, not saturation: a row's own maximum lies there.
        self.saturated += float((scaled.abs() > E4M3_MAX * (1 + 2**-4)).sum())
        live = scaled != 0
        self.live += float(live.sum())
        self.lost += float((live & (codes == 0)).sum())
        factor = torch.where(live, x / scaled.double(), 0.0)
        self.error += float((codes * factor - x).square().sum())

    def result(self, layer: int, tensor: str, modality: str) -> ActivationRange:
        assert self.channels is not None
        rms = (self.square / self.count) ** 0.5
        loudness = self.channels.sqrt()
        codes: tuple[float | None, float | None, float | None] = (None, None, None)
        if self.live:
            codes = (self.saturated / self.count, self.lost / self.live, (self.error / self.square) ** 0.5)
        return ActivationRange(
            layer,
            tensor,
            modality,
            self.amax,
            rms,
            self.count * self.fourth / self.square**2,
            self.amax / rms,
            float(loudness.max() / loudness.median().clamp_min(1e-30)),
            *codes,
        )


def measure_activations(model: HappyHorse, prompt: str, *, seed: int = 0, steps: int = 8) -> list[ActivationRange]:
    """Sample a clip in float32 and measure every layer in every step.

    Args:
        model: Of the pony's shape, in float32.
        prompt: In the pony's grammar.
        seed: Of the noise.
        steps: Denoising steps.
    """
    sums: dict[tuple[int, str, str], Sums] = {}

    def look(index: int, layer: Layer, given: LayerInputs) -> None:
        results = eager_ops(layer, given, torch.float32)
        rows = dict(zip(MODALITIES, given.clip.slices(), strict=False))
        for name, x, scaled in tensors(layer, given, results):
            for modality, part in rows.items():
                of = sums.setdefault((index, name, modality), Sums())
                of.add(x[part], None if scaled is None else scaled[part])

    with before_layers(model, look):
        generate(model, prompt, seed=seed, steps=steps)
    return [of.result(*key) for key, of in sums.items()]


def tensors(
    layer: Layer, given: LayerInputs, results: OpResults
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Yield (name, values [N, channels], the same divided by the scales that the op uses) of every tensor."""
    chunks = list(row_chunks(given.clip, layer.mlp.pre_norm.experts, 1 << 30))

    def units(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x.float() / scale

    up_input = normed(results.middle, layer.mlp.pre_norm, given.clip)
    yield "residual", given.hidden, None
    yield "qkv input", results.norm, units(results.norm, e4m3_rows(results.norm)[1][:, None])
    attention = layer.attention
    for which, (name, x) in enumerate((("q", results.q), ("k", results.k))):
        scale = torch.empty(len(x), 1, device=x.device)
        for e, rows in chunks:
            weights = torch.stack([attention.q_norm.of(e), attention.k_norm.of(e)])[None]
            scale[rows] = static_qk_scale(weights)[0, which]
        yield name, x.flatten(1), units(x.flatten(1), scale)
    v_scale = quantize_v(results.v)[1].repeat_interleave(128, dim=1)[:, : len(results.v)].T  # [N, Hkv]
    yield "v", results.v.flatten(1), units(results.v, v_scale[:, :, None]).flatten(1)
    yield "proj input", results.attention, units(results.attention, output_scale(results.v, None, results.gate))
    yield "up input", up_input, units(up_input, e4m3_rows(up_input)[1][:, None])
    down_scale = static_scale("swiglu7" if layer.mlp.gated else "gelu7", True, results.up.device)
    yield "down input", results.up, units(results.up, down_scale)
