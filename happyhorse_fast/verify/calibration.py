"""Measure the error of every op of every layer in 8 bits, and the range of its inputs, on clips that are sampled."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from happyhorse_fast import ambient, golden
from happyhorse_fast._version import __version__
from happyhorse_fast.budgets import measure
from happyhorse_fast.config import MODALITIES, OPS
from happyhorse_fast.eager.model import HappyHorse, Layer, normed
from happyhorse_fast.eager.sequence import Clip, row_chunks
from happyhorse_fast.fast.accelerate import choose_ops
from happyhorse_fast.fast.calibration import ATTENTION, FORMAT, MOST, Calibration, InputRange, OpCalibration, skip_rules
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.state import FastState, build_clip_state, is_accelerated
from happyhorse_fast.files import replacing
from happyhorse_fast.json_data import plain
from happyhorse_fast.ops.attention.reference import output_scale
from happyhorse_fast.ops.linear.contract import static_scale
from happyhorse_fast.ops.qkv.packing import static_qk_scale
from happyhorse_fast.ops.qkv.reference import quantize_v
from happyhorse_fast.ops.quantize import E4M3_MAX, e4m3_rows, to_e4m3
from happyhorse_fast.sampler import sample
from happyhorse_fast.verify.checks import in_dtype, seeded_inputs
from happyhorse_fast.verify.layer_ops import FastOps, LayerInputs, OpResults, before_layers, eager_ops


@ambient.independent
def calibrate(
    model: HappyHorse,
    clips: int,
    *,
    grid: tuple[int, int, int],
    text: int,
    steps: int = 8,
    seed: int = 0,
    most: float | None = None,
    checkpoint: str = "",
    report: Callable[[str], None],
    progress: bool = True,
) -> Calibration:
    """Sample clips in bf16, and run every op of every layer at every step again in float32, bf16, int8 and e4m3.

    Formats run in plain torch with the kernels' rounding points. Beside the model one layer's results in float32 and
    its weights in one format are held at a time.

    Args:
        model: Weights to calibrate for; its own compute dtype does not matter. It is left as it is.
        clips: How many; clip i starts from noise and text of ``seed + i``.
        grid: Token grid (latent frames, rows, columns) of a clip.
        text: Text tokens.
        steps: Denoising steps of a clip.
        seed: Of the first clip.
        most: Relative L2 that an op may have in every format; None: :data:`happyhorse_fast.fast.calibration.MOST`.
        checkpoint: Where the weights are from, for the record.
        report: Called with a line per clip and per fallback.
        progress: Whether to show a bar over the steps of a clip on stderr.

    Raises:
        ValueError: The model is accelerated.
        NonFiniteError: As for :func:`happyhorse_fast.sampler.sample`.
    """
    if is_accelerated(model):
        raise ValueError("model must hold its published weights to be calibrated for; it is accelerated")
    eager = in_dtype(model, torch.bfloat16)
    run = _Run(eager, report)
    with before_layers(eager, run.look):
        for clip in range(clips):
            report(f"calibrate: clip {clip + 1} of {clips}")
            inputs = seeded_inputs(model.config, grid, text=text, seed=seed + clip, device=model.device)
            sample(eager, *inputs, steps=steps, noise=functools.partial(golden.draw, seed + clip), progress=progress)
    ops = tuple(run.result(layer, op) for layer in range(model.config.num_layers) for op in OPS)
    allowed = dict(MOST) if most is None else dict.fromkeys(MOST, most)
    skip = {precision: skip_rules(ops, precision, allowed[precision]) for precision in ATTENTION}
    settings = (checkpoint, model.config.to_dict(), clips, steps, grid, text, seed)
    return Calibration(FORMAT, __version__, *settings, allowed, skip, ops)


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2; infinite where either is not finite, so that no maximum passes it over."""
    error = measure(result, expected).relative_l2
    return math.inf if math.isnan(error) else error


def write(found: Calibration, path: Path) -> None:
    """Write the file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")


class Sums:
    """Range of one input of an op, added up call by call in float64."""

    def __init__(self) -> None:
        self.largest = self.square = self.count = self.saturated = self.lost = self.live = 0.0

    def add(self, x: torch.Tensor, scaled: torch.Tensor) -> None:
        """Add values [rows, channels]; ``scaled`` is the same divided by its scales, before the cast to e4m3."""
        self.largest = max(self.largest, float(x.abs().max()))
        self.square += float(x.double().square().sum())
        self.count += x.numel()
        # Within half a step of 448 is rounding, not saturation: a row's own maximum lies there.
        self.saturated += float((scaled.abs() > E4M3_MAX * (1 + 2**-4)).sum())
        live = scaled != 0
        self.live += float(live.sum())
        self.lost += float((live & (to_e4m3(scaled).float() == 0)).sum())

    def result(self) -> InputRange:
        rms = (self.square / self.count) ** 0.5
        return InputRange(self.largest, rms, self.saturated / self.count, self.lost / max(self.live, 1))


def inputs_of(
    layer: Layer, given: LayerInputs, results: OpResults
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Yield (op, name, values [N, channels], the same divided by the scales that the op uses) of every input."""

    def units(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x.float() / scale

    yield "qkv", "qkv input", results.norm, units(results.norm, e4m3_rows(results.norm)[1][:, None])
    attention = layer.attention
    for which, (name, x) in enumerate((("q", results.q), ("k", results.k))):
        scale = torch.empty(len(x), 1, device=x.device)
        for e, rows in row_chunks(given.clip, layer.mlp.pre_norm.experts, 1 << 30):
            weights = torch.stack([attention.q_norm.of(e), attention.k_norm.of(e)])[None]
            scale[rows] = static_qk_scale(weights)[0, which]
        yield "attention", name, x.flatten(1), units(x.flatten(1), scale)
    v_scale = quantize_v(results.v)[1].repeat_interleave(128, dim=1)[:, : len(results.v)].T  # [N, Hkv]
    yield "attention", "v", results.v.flatten(1), units(results.v, v_scale[:, :, None]).flatten(1)
    of_proj = output_scale(results.v, None, results.gate)
    yield "proj", "proj input", results.attention, units(results.attention, of_proj)
    up_input = normed(results.middle, layer.mlp.pre_norm, given.clip)
    yield "up", "up input", up_input, units(up_input, e4m3_rows(up_input)[1][:, None])
    down_scale = static_scale("swiglu7" if layer.mlp.gated else "gelu7", True, results.up.device)
    yield "down", "down input", results.up, units(results.up, down_scale)


class _Run:
    """Ranges and errors found so far, while clips are sampled."""

    def __init__(self, model: HappyHorse, report: Callable[[str], None]) -> None:
        self.model = model
        self.ranges: dict[tuple[int, str], dict[str, Sums]] = {}
        self.errors: dict[tuple[int, str], dict[str, dict[str, float]]] = {}
        self.bounds: dict[int, float] = {}
        self.state: ClipState | None = None  # all clips are of one shape
        self.forms: dict[str, FastState] = {}
        for precision in ("bf16", *ATTENTION):
            fast = FastConfig(precision=precision, attention="bf16", backend="reference")  # type: ignore[arg-type]
            self.forms[precision] = FastState(model.config, fast, choose_ops(fast, model.device, report))

    @torch.no_grad()
    def look(self, index: int, layer: Layer, given: LayerInputs) -> None:
        """Run every op of a layer, in every format."""
        exact = eager_ops(layer, given, torch.float32)
        for op, name, x, scaled in inputs_of(layer, given, exact):
            self.ranges.setdefault((index, op), {}).setdefault(name, Sums()).add(x, scaled)
        rounded = eager_ops(layer, given, torch.bfloat16, exact)
        for op in OPS:
            self._compare(index, op, "bf16", rounded.of(op), exact, given.clip)
        del rounded
        if self.state is None:
            self.state = build_clip_state(self.forms["bf16"], given.clip, self.model.adapter.rope.bands)
        for precision, attention in ATTENTION.items():
            packed = self.forms[precision].pack(index, layer.state_dict(), given.hidden.device)
            self.bounds[index] = max(self.bounds.get(index, 0.0), packed.bound.effective)
            fast = FastOps(packed, self.state, given, exact)
            for op, result in (*fast.products(), ("attention", fast.attention_in(attention))):
                self._compare(index, op, precision, result, exact, given.clip)

    def _compare(self, index: int, op: str, precision: str, result: torch.Tensor, exact: OpResults, clip: Clip) -> None:
        expected = exact.of(op)
        worst = self.errors.setdefault((index, op), {}).setdefault(precision, dict.fromkeys(MODALITIES, 0.0))
        for modality, rows in zip(MODALITIES, clip.slices(), strict=True):
            worst[modality] = max(worst[modality], error_of(result[rows], expected[rows]))

    def result(self, layer: int, op: str) -> OpCalibration:
        """Ranges and largest errors of one op."""
        inputs = {name: sums.result() for name, sums in self.ranges[layer, op].items()}
        bound = self.bounds[layer] if op == "attention" else None
        return OpCalibration(layer, op, inputs, self.errors[layer, op], bound)
