"""``happyhorse-fast plan --pipeline``: memory and floors of the whole path, from a prompt to an mp4, per stage."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from happyhorse_fast.arguments import require_choice
from happyhorse_fast.cli.output import Shown, emit, gib, literal, table, verdict
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import CONTEXT_BYTES, gpu_named, usable_bytes
from happyhorse_fast.pipeline.layout import PARTS
from happyhorse_fast.pipeline.memory_plan import plan
from happyhorse_fast.pipeline.parts import DECODERS
from happyhorse_fast.pipeline.request import FPS, Request
from happyhorse_fast.pipeline.stage_plan import StagePlan, Work

SIZES = (24, 32, 48, 80)
"""Memory of the cards that are planned for, GB."""


def plan_pipeline(asked: Mapping[str, Any]) -> None:
    """Print the plan of one clip with a picture and a sound made by the public checkpoints, for every size of card.

    Args:
        asked: The options of ``happyhorse-fast plan`` by name.
    """
    require_choice("decoder", asked["decoder"], DECODERS)
    clip = {name: asked[name] for name in ("resolution", "aspect", "seconds")}
    formats = {name: asked[name] for name in ("precision", "attention")}  # FastConfig checks them
    request = Request(prompt="any", stages=asked["stages"], first=asked["first"], image=True, **clip)
    models = tuple(ModelConfig.preset(str(PARTS[name].preset)) for name in request.models)
    card = gpu_named(asked["gpu"])
    work = Work(request=request, models=models, decoder=asked["decoder"], text=asked["text"], gpu=card, **formats)
    print("tracing every stage under fake tensors...", file=sys.stderr)
    plans = {gb: plan(work, int(usable_bytes(gb))) for gb in SIZES}
    free = plan(work, None)
    data = {
        **clip,
        "fps": FPS,
        **formats,
        "gpu": card,
        "stages": free.stages,
        "resident_gib": free.resident_bytes / 2**30,
        "sequential_gib": free.sequential_bytes / 2**30,
        "floor_s": free.floor_s,
        "cards": [
            {
                "gb": gb,
                "fits": found.fits,
                "placement": found.placement,
                "kept": found.kept,
                "peak_gib": found.peak_bytes / 2**30,
                "budget_gib": usable_bytes(gb) / 2**30,
                "tiles": found.tiles,
                "layers_on_device": found.layers_on_device,
                "history_on_host": found.history_on_host,
            }
            for gb, found in plans.items()
        ],
    }
    emit(data, asked["as_json"], _shown(data))


def _shown(data: dict[str, Any]) -> Shown:
    yield literal(
        (f"{data['resolution']} {data['aspect']}, {data['seconds']} s at {data['fps']} fps", "bold"),
        f", {data['precision']}: every part on the device {data['resident_gib']:.1f} GiB, one at a time "
        f"{data['sequential_gib']:.1f} GiB; floor ",
        (f"{data['floor_s']:.1f} s", "bold"),
        f" on {data['gpu'].name}, without loading",
    )
    rows = [[s.name, s.part, gib(s.weight_bytes), gib(s.peak_bytes), f"{s.floor_s:.2f}"] for s in data["stages"]]
    yield table("per stage", ["stage", "part", "weights", "peak alone", "floor s"], rows, left=2)
    rows = [
        [
            f"{card['gb']} GB",
            verdict(card["fits"], "fits", "too large"),
            _staying(card["kept"], data["stages"]),
            f"{card['peak_gib']:.1f}",
            f"{card['budget_gib']:.1f}",
            _pieces(card),
        ]
        for card in data["cards"]
    ]
    title = f"per card, GiB; {CONTEXT_BYTES / 2**30:g} GiB stay free"
    yield table(title, ["card", "", "placement", "peak", "of", "in pieces"], rows, left=3, folded=[5])
    for card in data["cards"]:
        if card["placement"] == "mixed":
            yield f"on {card['gb']} GB stay: {', '.join(card['kept'])}"


def _staying(kept: tuple[str, ...], stages: tuple[StagePlan, ...]) -> str:
    count = len({stage.part for stage in stages})
    return {0: "one part at a time", count: "every part stays"}.get(len(kept), f"{len(kept)} of {count} parts stay")


def _pieces(card: dict[str, Any]) -> str:
    """What a plan cuts up."""
    said = []
    if card["tiles"] > 1:
        said.append(f"frames in {card['tiles']} tiles")
    if card["layers_on_device"] is not None:
        said.append(f"{card['layers_on_device']} layers of the text encoder stay, the rest are read when needed")
    if card["history_on_host"]:
        said.append("the solver's history on the host")
    return "; ".join(said) or "none"
