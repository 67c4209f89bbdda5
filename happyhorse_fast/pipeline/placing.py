"""How a run lies on its device: what is kept there and in which pieces, by the memory plan."""

from __future__ import annotations

import logging
from pathlib import Path

from happyhorse_fast.pipeline.memory_plan import PipelinePlan, Placement, budget_of, plan
from happyhorse_fast.pipeline.parts import DECODERS, Parts
from happyhorse_fast.pipeline.progress import Prediction
from happyhorse_fast.pipeline.request import DENOISED, RESOLVED, TEXT, VIDEO, Request
from happyhorse_fast.pipeline.stage_plan import Work, stage_plans

logger = logging.getLogger(__name__)

DISK = 2e9
"""Bytes a second that a part is read with, of a local NVMe disk."""
OVER_FLOOR = 2.0
"""Seconds of a stage over its floor, until they are measured."""
LEAST = Prediction(load=0.2, compute=0.1)


def work_of(parts: Parts, request: Request) -> Work:
    """A run in the memory plan's words."""
    return Work(
        request=request,
        models=tuple(parts.config(name) for name in request.models),
        precision=None if parts.fast is None else parts.fast.precision,
        attention=None if parts.fast is None else parts.fast.attention,
        decoder=parts.decoder,
    )


def place(parts: Parts, request: Request, placement: Placement) -> PipelinePlan:
    """Choose what stays on the device; a run that fits in no way is told so by a warning, and tried.

    On a CPU nothing is traced, and one part is there at a time unless ``placement`` says otherwise; it waits in the
    same memory afterwards as far as that allows: of the published parts 60 GB.
    """
    work = work_of(parts, request)
    if parts.device.type == "cpu":
        kept = tuple(request.parts.values()) if placement == "resident" else ()
        return PipelinePlan(stage_plans(work, traced=False), kept)
    found = plan(work, budget_of(parts.device), placement)
    if not found.fits:
        need, there = found.peak_bytes / 2**30, (found.budget_bytes or 0) / 2**30
        logger.warning(
            "this clip is planned to take %.1f GiB, %s has %.1f; `happyhorse-fast plan --pipeline` says what fits",
            need,
            parts.device,
            there,
        )
    return found


def predicted(parts: Parts, plan: PipelinePlan, stages: list[str]) -> dict[str, Prediction]:
    """Seconds of each of a run's stages: its floor twice, and what brings its part, a large one's files at a disk's."""
    of_stage = {stage.name: stage for stage in plan.stages}
    found = {}
    for name in stages:
        stage = of_stage[name]
        load = parts.residency.seconds_to_bring(stage.part)
        if load is None:
            file = DECODERS[parts.decoder] if name == VIDEO else stage.part
            large = name in (TEXT, DENOISED, RESOLVED, VIDEO) and parts.layout.there(file)
            load = LEAST.load + (_bytes(parts.layout.find(file)) / DISK if large else 0.0)
        found[name] = Prediction(load, LEAST.compute + OVER_FLOOR * stage.floor_s)
    return found


def _bytes(folder: Path) -> int:
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
