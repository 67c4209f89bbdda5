"""Memory of the whole path, planned before anything is loaded: which parts stay on the device, and in what pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from happyhorse_fast.pipeline.request import RESOLVED, TEXT, VIDEO
from happyhorse_fast.pipeline.stage_plan import (
    TEXT_LAYER_BYTES,
    TEXT_LAYERS,
    TEXT_ROW_BYTES,
    StagePlan,
    Work,
    stage_plans,
    text_stage,
    video_stage,
)

Placement = Literal["auto", "resident", "sequential"]

TILES = (1, 2, 4, 6, 9, 16)
WORKSPACE_BYTES = 2**30
"""Of the budget, for the workspaces of cuDNN and cuBLAS, which no plan counts: a part does not stay for this room."""


@dataclass(frozen=True)
class PipelinePlan:
    """How a run lies on a device.

    Attributes:
        stages: In order.
        kept: Parts that stay on the device; of the others there is one at a time.
        tiles: Of the turbo decoder.
        layers_on_device: Of the text encoder; None for all.
        history_on_host: Of :func:`~happyhorse_fast.sampler.super_resolve`.
        budget_bytes: What may be taken; None without a limit.
    """

    stages: tuple[StagePlan, ...]
    kept: tuple[str, ...]
    tiles: int = 1
    layers_on_device: int | None = None
    history_on_host: bool = False
    budget_bytes: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts, in the order of their first use."""
        return tuple(dict.fromkeys(stage.part for stage in self.stages))

    @property
    def placement(self) -> Literal["resident", "mixed", "sequential"]:
        """Whether all parts stay on the device, some, or none."""
        return "sequential" if not self.kept else "resident" if len(self.kept) == len(self.parts) else "mixed"

    @property
    def sequential_bytes(self) -> int:
        """Peak with one part at a time."""
        return peak_with(self.stages, ())

    @property
    def resident_bytes(self) -> int:
        """Peak with every part on the device: all weights, and the largest stage's rest."""
        return peak_with(self.stages, self.parts)

    @property
    def peak_bytes(self) -> int:
        """Peak with the parts that stay."""
        return peak_with(self.stages, self.kept)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def floor_s(self) -> float:
        """Sum of the stages' floors, seconds."""
        return sum(stage.floor_s for stage in self.stages)


def peak_with(stages: Sequence[StagePlan], kept: Collection[str]) -> int:
    """Peak bytes of stages of which each has its own part on the device and those that are ``kept``."""
    weights = {stage.part: stage.weight_bytes for stage in stages if stage.part in kept}
    return max(stage.peak_bytes + sum(weights.values()) - weights.get(stage.part, 0) for stage in stages)


def plan(work: Work, budget_bytes: int | None, placement: Placement = "auto") -> PipelinePlan:
    """Place a run on a device.

    All parts stay on the device where they fit. Otherwise there is one at a time, and what is still too large is cut
    up: the turbo decoder's frames into tiles, the text encoder into layers that are read when they are needed, and the
    second stage's history goes to the host between evaluations. In the room that is left parts stay, those first that
    cost most to bring back: models, then by size. Results stay the same, but for the rounding of tiles.

    Args:
        work: What is to be done.
        budget_bytes: What tensors may take; of a card ``costs.usable_bytes(gb)``. None: no limit.
        placement: All parts stay (``"resident"``), or none (``"sequential"``); ``"auto"``: as above.

    Returns:
        The plan; ``fits`` says whether it is within the budget.
    """
    found = PipelinePlan(stage_plans(work), (), budget_bytes=budget_bytes)
    whole = dataclasses.replace(found, kept=found.parts)
    if placement == "resident" or (placement == "auto" and whole.fits):
        return whole
    changes: dict[str, Any] = {}
    if budget_bytes is not None:
        too_large = {stage.name for stage in found.stages if stage.peak_bytes > budget_bytes}
        if TEXT in too_large:
            changes["layers_on_device"] = _text_layers(work, budget_bytes)
        if RESOLVED in too_large:
            changes["history_on_host"] = True
        if VIDEO in too_large and work.decoder == "turbo":
            fitting = (tiles for tiles in TILES if video_stage(work, tiles).peak_bytes <= budget_bytes)
            changes["tiles"] = next(fitting, TILES[-1])
    if changes:
        found = PipelinePlan(stage_plans(work, **changes), (), budget_bytes=budget_bytes, **changes)
    return found if placement == "sequential" or not found.fits else _keeping(work, found)


def _keeping(work: Work, alone: PipelinePlan) -> PipelinePlan:
    """``alone``, one part at a time, with as many parts kept as there is room for.

    A model is read from up to four times its bytes and packed again. The text encoder, where it does not stay, needs no
    more room than a layer: those that do not fit are read when they are needed, once a prompt as all of them are.
    """
    room = (alone.budget_bytes or 0) - WORKSPACE_BYTES
    rest = tuple(stage for stage in alone.stages if stage.name != TEXT)
    whole, least = text_stage(work, None), text_stage(work, 0)
    weights = {stage.part: stage.weight_bytes for stage in (*rest, whole)}
    kept: list[str] = []
    for part in sorted(weights, key=lambda part: (part in work.request.models, weights[part]), reverse=True):
        tried = [*kept, part]
        if peak_with([*rest, whole if whole.part in tried else least], tried) <= room:
            kept = tried
    if not kept:
        return alone
    beside = sum(weights[part] for part in kept)
    layers = None if whole.part in kept else _text_layers(work, room - beside)
    stages = tuple(text_stage(work, layers) if stage.name == TEXT else stage for stage in alone.stages)
    in_order = tuple(part for part in alone.parts if part in kept)
    return dataclasses.replace(alone, stages=stages, kept=in_order, layers_on_device=layers)


def _text_layers(work: Work, room: int) -> int | None:
    """How many of the text encoder's layers may stay while it runs, beside one that is read; None for all."""
    if text_stage(work, None).peak_bytes <= room:
        return None
    return max(0, min(TEXT_LAYERS - 1, (room - TEXT_ROW_BYTES * work.text) // TEXT_LAYER_BYTES - 1))


def budget_of(device: torch.device) -> int | None:
    """What tensors may take on a CUDA device: free memory and this process's own share; None elsewhere."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device), allowed)
