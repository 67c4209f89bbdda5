"""How a run lies on its device: what is kept there and in which pieces, by the memory plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from happyhorse_fast.pipeline.memory_plan import PipelinePlan, budget_of, plan
from happyhorse_fast.pipeline.parts import DECODERS, Parts
from happyhorse_fast.pipeline.progress import Prediction
from happyhorse_fast.pipeline.request import DENOISED, RESOLVED, TEXT, VIDEO, Request
from happyhorse_fast.pipeline.stage_plan import Work, floors

logger = logging.getLogger(__name__)

Placement = Literal["auto", "resident", "sequential"]
PLACEMENTS = ("auto", "resident", "sequential")
DISK = 2e9
"""Bytes a second that a part is read with, of a local NVMe disk."""
OVER_FLOOR = 2.0
"""Seconds of a stage over its floor, until they are measured."""
LEAST = Prediction(load=0.2, compute=0.1)


@dataclass(frozen=True)
class Placing:
    """What a run does so that it fits.

    Attributes:
        kept: Names of the parts that stay on the device after their use.
        placement: What that amounts to: all parts (``"resident"``), none (``"sequential"``) or some (``"mixed"``).
        tiles: Of the turbo decoder.
        layers_on_device: Of the text encoder; None for all.
        history_on_host: Of the second stage's solver.
        plan: What it follows; None on a CPU, where nothing is planned.
    """

    kept: tuple[str, ...]
    placement: str
    tiles: int = 1
    layers_on_device: int | None = None
    history_on_host: bool = False
    plan: PipelinePlan | None = None


def work_of(parts: Parts, request: Request) -> Work:
    """A run in the memory plan's words."""
    configs = [parts.config(name) for name in request.models]
    return Work(
        first=configs[0],
        second=configs[1] if len(configs) > 1 else None,
        first_clip=request.first_tokens,
        last_clip=request.last_tokens,
        mode="base" if request.first == "base" else "distilled",
        precision=None if parts.fast is None else parts.fast.precision,
        attention=None if parts.fast is None else parts.fast.attention,
        decoder=parts.decoder,
        image=request.image,
        sound=request.sound,
    )


def place(parts: Parts, request: Request, placement: Placement) -> Placing:
    """Choose what stays on the device; a run that fits in no way is told so by a warning, and tried.

    On a CPU one part is there at a time unless ``placement`` says otherwise, and waits in the same memory afterwards as
    far as that allows: of the published parts 60 GB.
    """
    names = parts.names(request)
    if parts.device.type == "cpu":
        return Placing(tuple(names.values()), "resident") if placement == "resident" else Placing((), "sequential")
    found = plan(work_of(parts, request), budget_of(parts.device), None if placement == "auto" else placement)
    if not found.fits:
        need, there = found.peak_bytes / 2**30, (found.budget_bytes or 0) / 2**30
        logger.warning(
            "this clip is planned to take %.1f GiB, %s has %.1f; `happyhorse-fast plan --pipeline` says what fits",
            need,
            parts.device,
            there,
        )
    kept = tuple(names[stage.name] for stage in found.stages if stage.part in found.kept)
    return Placing(kept, found.placement, found.tiles, found.layers_on_device, found.history_on_host, found)


def predicted(parts: Parts, request: Request, stages: list[str]) -> dict[str, Prediction]:
    """Seconds of each of a run's stages: its floor twice, and what brings its part, a large one's files at a disk's."""
    held, least = parts.names(request), floors(work_of(parts, request))
    files = {TEXT: "text_encoder", VIDEO: DECODERS[parts.decoder]}
    files |= {stage: held[stage] for stage in (DENOISED, RESOLVED) if stage in held}
    found = {}
    for stage in stages:
        load = parts.residency.seconds_to_bring(held[stage])
        if load is None:
            there = stage in files and parts.layout.there(files[stage])
            load = LEAST.load + (_bytes(parts.layout.find(files[stage])) / DISK if there else 0.0)
        found[stage] = Prediction(load, LEAST.compute + OVER_FLOOR * least[stage])
    return found


def _bytes(folder: Path) -> int:
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
