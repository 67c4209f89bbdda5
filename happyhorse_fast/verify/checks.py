"""Compare the eager model with the recorded cases, and float32 and bfloat16 with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from happyhorse_fast import ambient, golden
from happyhorse_fast.budgets import measure
from happyhorse_fast.config import PATCH, ModelConfig
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import rotary_phases
from happyhorse_fast.golden import GoldenCase
from happyhorse_fast.sampler import StepInfo, sample, super_resolve
from happyhorse_fast.sampler.super_resolve import signal_table
from happyhorse_fast.tokens import ClipTokens

FORWARD_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative L2 of a layer's residual stream or of a velocity."""
SAMPLER_BUDGET = 1e-4
"""Relative L2 of a latent after a float32 sampler's step."""
_EXACT = 1e-30  # stands for a budget of 0 where errors are ranked by their share of the budget


@dataclass(frozen=True)
class Measurement:
    """One compared tensor.

    Attributes:
        what: Its name: ``sequence.rope``, ``layer.3``, ``out.video``, ``sampler.final.audio``...
        error: Relative L2; infinite where the result is not finite.
        budget: Largest error allowed.
        cosine: Cosine similarity, where it was asked for.
    """

    what: str
    error: float
    budget: float
    cosine: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within its budget."""
        return self.error <= self.budget


@dataclass(frozen=True)
class Comparison:
    """All measurements of one case.

    Attributes:
        name: Of the recorded case, or the precision that was compared.
        dtype: Compute dtype, without the ``torch.`` before it.
        measurements: In the order of the computation; empty where ``skipped``.
        skipped: Why nothing was compared, or None.
    """

    name: str
    dtype: str
    measurements: tuple[Measurement, ...]
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every measurement is within its budget; a skipped case has none, and passes."""
        return all(m.passed for m in self.measurements)

    def worst(self, prefix: str = "") -> Measurement | None:
        """The measurement that takes most of its budget, among those whose name starts with ``prefix``."""
        matching = [m for m in self.measurements if m.what.startswith(prefix)]
        return max(matching, key=lambda m: m.error / max(m.budget, _EXACT), default=None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error(what: str, value: torch.Tensor, expected: torch.Tensor, budget: float) -> Measurement:
    return Measurement(what, measure(value, expected).relative_l2, budget)


# Recorded cases -------------------------------------------------------------------------------------------------------


@ambient.independent
def verify_case(case: GoldenCase, model: HappyHorse | None = None) -> Comparison:
    """Compare the eager model with one recorded case: sequence, every layer, velocities, and its sampler if it has one.

    Args:
        case: From :func:`happyhorse_fast.golden.load_case`.
        model: To compare in place of the case's own eager model.
    """
    model = case.model() if model is None else model
    dtype = _name(case.compute_dtype)
    if "sr.start.video" in case.tensors:
        try:
            return Comparison(case.name, dtype, tuple(_second_stage(case, model)))
        except ImportError as error:
            return Comparison(case.name, dtype, (), skipped=str(error))
    found = [*_sequence(case, model), *_forward(case, model)]
    if "sampler.final.video" in case.tensors:
        found += _distilled(case, model)
    return Comparison(case.name, dtype, tuple(found))


def verify_golden() -> list[Comparison]:
    """Compare the eager model with every recorded case."""
    return [verify_case(golden.load_case(name)) for name in golden.names()]


def _sequence(case: GoldenCase, model: HappyHorse) -> list[Measurement]:
    t = case.tensors
    video, audio, text = t["in.video"], t["in.audio"], t["in.text"]
    clip = sequence.check_inputs(case.config, video, audio, text, model.device)
    coords = sequence.coordinates(clip, case.config.coords_style)
    ranges = torch.tensor(sequence.local_ranges(clip, case.config.frame_receptive_field))
    recorded = torch.cat([t["local.q_ranges"], t["local.k_ranges"]], dim=1)
    return [
        _error("sequence.tokens", sequence.pack_tokens(video, audio, text), t["tokens"], 0.0),
        _error("sequence.modality", sequence.modality_of_tokens(clip), t["modality"], 0.0),
        _error("sequence.coords", coords, t["coords"], 0.0),
        _error("sequence.ranges", ranges, recorded, 0.0),
        _error("sequence.rope", rotary_phases(coords, model.adapter.rope.bands), t["rope"], 1e-5),
    ]


def _forward(case: GoldenCase, model: HappyHorse) -> list[Measurement]:
    t, found, budget = case.tensors, [], FORWARD_BUDGET[case.compute_dtype]

    def compare(layer: int, hidden: torch.Tensor) -> None:
        found.append(_error(f"layer.{layer}", hidden, t[f"layer.{layer}.out"], budget))

    with torch.no_grad():
        video, audio = model(t["in.video"], t["in.audio"], t["in.text"], on_layer=compare)
    return [
        *found,
        _error("out.video", video, t["out.video"], budget),
        _error("out.audio", audio, t["out.audio"], budget),
    ]


def _distilled(case: GoldenCase, model: HappyHorse) -> list[Measurement]:
    t, steps, recorded = case.tensors, list[StepInfo](), case.tensors["sampler.sigmas"]
    inputs = (t["in.video"], t["in.audio"], t["in.text"])
    options: Any = {"steps": len(recorded) - 1, "noise": case.draw, "callback": steps.append, "progress": False}
    video, audio = sample(model, *inputs, **options)
    return [
        _error("sampler.sigmas", _sigmas(steps, recorded), recorded, 1e-6),
        _error("sampler.step0.video", steps[0].video, t["sampler.step0.video"], SAMPLER_BUDGET),
        _error("sampler.step0.audio", steps[0].audio, t["sampler.step0.audio"], SAMPLER_BUDGET),
        _error("sampler.final.video", video, t["sampler.final.video"], SAMPLER_BUDGET),
        _error("sampler.final.audio", audio, t["sampler.final.audio"], SAMPLER_BUDGET),
    ]


def _second_stage(case: GoldenCase, model: HappyHorse) -> list[Measurement]:
    t, steps, recorded = case.tensors, list[StepInfo](), case.tensors["sr.sigmas"]
    rows, columns = t["sr.start.video"].shape[3:]
    given: list[torch.Tensor] = []  # video and audio of every call
    inputs = (t["in.base.video"], t["in.base.audio"], t["in.text"])
    options: Any = {"steps": len(recorded) - 1, "noise": case.draw, "callback": steps.append, "progress": False}
    handle = model.register_forward_pre_hook(lambda _, latents: given.extend(x.clone() for x in latents[:2]))
    try:
        super_resolve(model, *inputs, size=(rows, columns), **options)
    finally:
        handle.remove()
    return [
        _error("sampler.table", signal_table(), t["sr.table"], 1e-6),
        _error("sampler.sigmas", _sigmas(steps, recorded), recorded, 1e-6),
        _error("sampler.start.video", given[0], t["sr.start.video"], SAMPLER_BUDGET),
        _error("sampler.start.audio", given[1], t["sr.start.audio"], SAMPLER_BUDGET),
        *(
            _error(f"sampler.step{i}.video", step.video, t[f"sr.step{i}.video"], SAMPLER_BUDGET)
            for i, step in enumerate(steps)
        ),
    ]


def _sigmas(steps: list[StepInfo], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([*(step.sigma for step in steps), 0.0], dtype=like.dtype)


# A model at three precisions ------------------------------------------------------------------------------------------


def in_dtype(model: HappyHorse, dtype: torch.dtype) -> HappyHorse:
    """Make the same model in another compute dtype; it shares the weights, so it takes no memory."""
    other = HappyHorse(model.config, dtype, device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@ambient.independent
def seeded_inputs(
    config: ModelConfig, grid: tuple[int, int, int], *, text: int, seed: int, device: torch.device
) -> list[torch.Tensor]:
    """Draw video, audio and text of a clip, standard normal; audio has 4 (T - 1) + 1 tokens."""
    clip = ClipTokens(grid[0], grid[1] * PATCH[1], grid[2] * PATCH[2], audio=4 * (grid[0] - 1) + 1)
    shapes = clip.shapes(config, text)
    return [golden.draw(seed, f"in.{modality}", shape).to(device) for modality, shape in shapes.items()]


@ambient.independent
def verify_model(
    model: HappyHorse,
    grid: tuple[int, int, int] = (3, 4, 6),
    *,
    text: int = 16,
    seed: int = 0,
) -> list[Comparison]:
    """Compare float32 and bfloat16 with float64 on seeded inputs: every layer and both velocities.

    Args:
        model: Weights to verify; its own compute dtype does not matter.
        grid: Token grid (latent frames, rows, columns) of the clip; audio has 4 (T - 1) + 1 tokens.
        text: Text tokens.
        seed: Of the inputs.

    Returns:
        A comparison per precision, video and audio rows apart: ``layer.3.video``, ``out.audio``...
    """
    inputs = seeded_inputs(model.config, grid, text=text, seed=seed, device=model.device)
    exact = _run(in_dtype(model, torch.float64), inputs)
    return [
        _compare(_name(dtype), _run(in_dtype(model, dtype), inputs), exact, budget)
        for dtype, budget in FORWARD_BUDGET.items()
    ]


def run_layers(
    model: HappyHorse, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Run a model; returns ``"layer.3.video"`` -> residual stream [M, C] in ``dtype`` on the CPU, and velocities."""
    video, audio, text = inputs
    rows = sequence.check_inputs(model.config, video, audio, text, model.device).slices()[:2]
    kept: dict[str, torch.Tensor] = {}

    def keep(layer: int, hidden: torch.Tensor) -> None:
        for name, part in zip(("video", "audio"), rows, strict=True):
            kept[f"layer.{layer}.{name}"] = hidden[part].cpu().to(dtype)

    with torch.no_grad():
        return kept, model(video, audio, text, on_layer=keep)


def _run(model: HappyHorse, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    kept, (video, audio) = run_layers(model, inputs, torch.float64)
    return {**kept, "out.video": video.double().cpu(), "out.audio": audio.double().cpu()}


def _compare(name: str, got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], budget: float) -> Comparison:
    found = []
    for what, expected in exact.items():
        cosine = torch.nn.functional.cosine_similarity(got[what].flatten(), expected.flatten(), dim=0)
        found.append(replace(_error(what, got[what], expected, budget), cosine=float(cosine)))
    return Comparison(f"{name} against float64", name, tuple(found))
