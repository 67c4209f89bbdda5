"""Measure each step away from float32: bf16, the kernels, 8 bits, sparsity; per op, per layer and end to end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from happyhorse_fast import ambient, golden
from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.budgets import measure
from happyhorse_fast.config import MODALITIES
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.state import FastState, build_clip_state, is_accelerated
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.sampler import sample
from happyhorse_fast.verify.checks import in_dtype, run_layers, seeded_inputs
from happyhorse_fast.verify.layer_ops import OPS, FastOps, OpResults, eager_ops, record_inputs

Results = dict[str, torch.Tensor]
"""Name of a result, such as ``op.3.attention.video`` or ``latent.audio``, -> float32 [rows, features] on the CPU."""

EAGER = "eager bf16"
BF16_RATIO = 2.0
"""A fast bf16 result, or the median of many, may be this many times as far from float32 as eager bf16's own."""
FP8_SANITY = 0.3
"""Relative L2 past which fp8 is broken rather than coarse. Measured on the recorded cases: an op 2.6e-2 to 5.7e-2, a
velocity 6.0e-2 to 8.5e-2; a dropped tile of 128 x 128 in a result of two tiles is 0.7."""
SPARSE_SANITY = 1.0
"""Of velocities alone: past 1 zeros would be closer. An attention op may be: random weights attend to all keys alike,
and the mean over half of them is 1.4 away from the mean over all (measured on 168 video tokens)."""


@dataclass(frozen=True)
class Distance:
    """Distance between one result of a form and float32's.

    Attributes:
        relative_l2: ||x - y|| / ||y||; infinite where x is not finite.
        cosine: <x, y> / (|x| |y|).
        tile_distance: Worst 128 x 128 tile of 1 - 2<x, y> / (|x|^2 + |y|^2).
        own: What this form's step adds: ||x - x'|| / ||y|| with x' the form before (float32 for the first).
        psnr_db: Of latents: 20 log10((max y - min y) / RMS(x - y)); None for other results.
    """

    relative_l2: float
    cosine: float
    tile_distance: float
    own: float
    psnr_db: float | None = None


@dataclass(frozen=True)
class FormErrors:
    """One form's distances.

    Attributes:
        form: ``"eager bf16"``, ``"fast bf16"``, ``"fast int8"``, ``"fast fp8"`` or ``"fast bf16, attention int8_qk"``,
            or the last one ``"+ sparsity"``.
        step: What sets it apart from the form before: ``"bf16"``, ``"kernels"``, ``"int8"``, ``"fp8"``,
            ``"attention"`` or ``"sparsity"``.
        backends: Implementations that its ops ran on; empty for eager PyTorch.
        errors: Distance per result.
        violations: What is past its budget, as sentences with the measured number.
    """

    form: str
    step: str
    backends: tuple[str, ...]
    errors: dict[str, Distance]
    violations: tuple[str, ...]


@dataclass(frozen=True)
class Equivalence:
    """All forms of one model on one clip.

    Attributes:
        case: Name.
        device: Type of device it ran on.
        layers: Number of layers.
        hidden_size: Width of the residual stream.
        tokens: Video, audio and text tokens.
        video_blocks: Blocks of 128 rows that the video takes; sparsity can leave out nothing where it is 1.
        steps: Denoising steps behind the latents; 0 where none were sampled.
        attention: Precision of attention.
        sparsity: Policy of the sparse form, None where there is none.
        forms: In the order of their steps.
    """

    case: str
    device: str
    layers: int
    hidden_size: int
    tokens: tuple[int, int, int]
    video_blocks: int
    steps: int
    attention: str
    sparsity: str | None
    forms: tuple[FormErrors, ...]

    @property
    def passed(self) -> bool:
        """Whether every form is within its budget."""
        return not any(form.violations for form in self.forms)


def forms_of(fast: FastConfig) -> Iterator[tuple[str, str, FastConfig]]:
    """Yield (form, step, configuration) of every fast form on the way to ``fast``."""
    yield "fast bf16", "kernels", dataclasses.replace(fast, precision="bf16", attention="bf16", skip=(), sparsity=None)
    name = f"fast {fast.precision}"
    if fast.precision != "bf16":
        yield name, fast.precision, dataclasses.replace(fast, sparsity=None)
    elif fast.attention_format != "bf16":
        name += f", attention {fast.attention_format}"
        yield name, "attention", dataclasses.replace(fast, sparsity=None)
    if fast.sparsity is not None:
        yield f"{name} + sparsity", "sparsity", fast


@ambient.independent
def equivalence(
    model: HappyHorse, inputs: list[torch.Tensor], case: str, fast: FastConfig, *, steps: int = 8, seed: int = 0
) -> Equivalence:
    """Measure every form of a model against its float32 on one clip.

    Beside the model one form's packed weights are held at a time.

    Args:
        model: Weights to measure; its own compute dtype does not matter. It is left as it is.
        inputs: video, audio, text on the model's device; latents start from them as if they were noise.
        case: Name of the result.
        fast: Where the forms lead: precision, attention, sparsity, backend.
        steps: Denoising steps to sample latents with; 0 for none.
        seed: Of the sampler's noise.

    Raises:
        ValueError: The model is accelerated.
        BackendError: A backend that ``fast`` names cannot run here.
    """
    if is_accelerated(model):
        raise ValueError("model must hold its published weights to be compared with float32; it is accelerated")
    video, audio, text = inputs
    clip = sequence.check_inputs(model.config, video, audio, text, model.device)
    exact_model = in_dtype(model, torch.float32)
    given = record_inputs(exact_model, inputs)
    ops = [eager_ops(layer, x, torch.float32) for layer, x, _ in _each(exact_model, given, given)]
    run = partial(_end_to_end, inputs=inputs, steps=steps, seed=seed)
    exact = _by_modality(ops, clip) | run(exact_model)

    eager_model = in_dtype(model, torch.bfloat16)
    eager = [eager_ops(layer, x, torch.bfloat16, of) for layer, x, of in _each(eager_model, given, ops)]
    before = _by_modality(eager, clip) | run(eager_model)
    found = [FormErrors(EAGER, "bf16", (), _distances(before, exact, exact), ())]
    del eager_model, eager
    video_rows = 0
    fast = fast.on(compute_capability(model.device))
    for form, step, how in forms_of(fast):
        accelerated = accelerate(in_dtype(model, torch.bfloat16), dataclasses.replace(how, originals="drop"))
        carried: FastState = accelerated.fast  # type: ignore[assignment]
        state = build_clip_state(carried, clip, exact_model.adapter.rope.bands)
        video_rows = state.rows.starts[1]
        layers = [FastOps(layer, state, x, of).results() for layer, x, of in _each(accelerated, given, ops)]
        after = _by_modality(layers, clip) | run(accelerated)
        errors = _distances(after, before, exact)
        backends = tuple(sorted({choice.backend for choice in carried.choices.values()}))
        found.append(FormErrors(form, step, backends, errors, tuple(violations(step, errors, found[0].errors))))
        before = after
        del accelerated, carried, state, layers
    tokens = (clip.video, clip.audio, clip.text)
    return Equivalence(
        case,
        model.device.type,
        model.config.num_layers,
        model.config.hidden_size,
        tokens,
        video_rows // BLOCK,
        steps,
        fast.attention_format,
        None if fast.sparsity is None else str(fast.sparsity),
        tuple(found),
    )


def equivalence_golden(fast: FastConfig, *, steps: int = 8, device: str = "cpu") -> list[Equivalence]:
    """Measure the recorded cases' models on their inputs; with sparsity also a clip of 8 blocks.

    The recorded clips have one or two blocks, of which one is always kept, so they are measured without sparsity.
    """

    def measured(case: golden.GoldenCase, inputs: list[torch.Tensor], name: str, how: FastConfig) -> Equivalence:
        return equivalence(case.model().to(device), inputs, name, how, steps=steps, seed=case.seed)

    found = []
    exact_masks = dataclasses.replace(fast, sparsity=None)
    for case in map(golden.load_case, golden.names()):
        # The bf16 records are of the same models, and the second stage's are of a sampler.
        if case.compute_dtype == torch.float32 and "in.video" in case.tensors:
            inputs = [case.tensors[f"in.{modality}"].to(device) for modality in MODALITIES]
            found.append(measured(case, inputs, case.name, exact_masks))
    if fast.sparsity is not None:
        case = golden.load_case("local_d128_fp32")
        inputs = seeded_inputs(case.config, (8, 8, 16), text=21, seed=case.seed, device=torch.device(device))
        found.append(measured(case, inputs, "seeded weights, 8 blocks", fast))
    return found


def _each(model: torch.nn.Module, *lists: list[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(model.block.layers, *lists, strict=True)  # type: ignore[union-attr,arg-type]


def _by_modality(ops: list[OpResults], clip: sequence.Clip) -> Results:
    rows = dict(zip(("video", "audio"), clip.slices()[:2], strict=True))
    return {
        f"op.{layer}.{op}.{modality}": results.of(op)[part].cpu()
        for layer, results in enumerate(ops)
        for op in OPS
        for modality, part in rows.items()
    }


def _end_to_end(model: HappyHorse, inputs: list[torch.Tensor], steps: int, seed: int) -> Results:
    kept, velocities = run_layers(model, inputs, torch.float32)
    outputs = {"velocity": velocities}
    if steps:
        outputs["latent"] = sample(model, *inputs, steps=steps, noise=partial(golden.draw, seed), progress=False)
    for name, (video, audio) in outputs.items():
        # Channels against positions: a [1, ...] tensor would be one row, and its tiles 1 x 128.
        kept[f"{name}.video"] = video[0].flatten(1).float().cpu()
        kept[f"{name}.audio"] = audio[0].float().cpu()
    return kept


def _distances(results: Results, before: Results, exact: Results) -> dict[str, Distance]:
    return {what: _distance(what, results[what], before[what], y) for what, y in exact.items()}


def _distance(what: str, x: torch.Tensor, before: torch.Tensor, y: torch.Tensor) -> Distance:
    error = measure(x, y)
    if not error.finite:
        return Distance(float("inf"), float("nan"), float("inf"), float("inf"))
    x, before, y = x.double(), before.double(), y.double()
    own = float((x - before).norm() / y.norm())
    cosine = float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300))
    psnr = None
    if what.startswith("latent"):
        rms = (x - y).square().mean().sqrt().clamp_min(1e-300)
        psnr = float(20 * torch.log10((y.max() - y.min()) / rms))
    return Distance(error.relative_l2, cosine, error.tile_distance, own, psnr)


def violations(step: str, errors: dict[str, Distance], eager: dict[str, Distance]) -> Iterator[str]:
    """Yield a sentence for each result past its budget: eager bf16's own error in bf16, a sanity bound in 8 bits."""
    for what, error in errors.items():
        if not math.isfinite(error.relative_l2):
            yield f"{what} holds NaN or Inf"
            continue
        if step == "kernels":
            budget, of = BF16_RATIO * eager[what].relative_l2, f"{BF16_RATIO:g} x eager bf16's own"
        elif step in ("int8", "fp8", "attention"):
            budget, of = FP8_SANITY, f"sanity bound of {step}"
        elif what.startswith("velocity"):
            budget, of = SPARSE_SANITY, "sanity bound of sparsity"
        else:
            continue
        if not error.relative_l2 <= budget:
            yield f"{what} is off by {error.relative_l2:.2e}, budget {budget:.2e} ({of})"
