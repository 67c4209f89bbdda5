"""``happyhorse-fast plan``: compute the cost of a clip before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from happyhorse_fast.cli.options import given
from happyhorse_fast.cli.output import JsonOption, Shown, emit, gib, literal, number, table
from happyhorse_fast.config import PATCH, ModelConfig
from happyhorse_fast.costs import CARDS, GPUS, OUTSIDE, OpCost, cards_for, gpu_named, step_costs, totals
from happyhorse_fast.costs import window_share as window_share_of
from happyhorse_fast.fast.config import FastConfig, default_attention
from happyhorse_fast.parallel.costs import LINKS, layer_exchange
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens, fps_of, tokens_for

PRESET = "happyhorse-1.0-15b"
_ONE_MODEL = ("preset", "steps", "video_share", "gpus", "shard_weights", "memory")
_WHOLE_PATH = ("stages", "first", "decoder")
"""Options that mean something without --pipeline alone, and with it alone."""


def plan(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(ModelConfig.preset_names())}.", show_default=PRESET),
    ] = None,
    resolution: Annotated[str, typer.Option(help="1080p, 540p or 256p.")] = "1080p",
    aspect: Annotated[str, typer.Option(help="16:9, 9:16 or 1:1.")] = "16:9",
    seconds: Annotated[int, typer.Option(help="Length, 3 to 15.")] = 5,
    fps: Annotated[
        int | None,
        typer.Option(help="24 or 25; by default what the preset's weights mean. With --pipeline 25 alone."),
    ] = None,
    text: Annotated[int, typer.Option(help="Text tokens.")] = TEXT_TOKENS,
    precision: Annotated[str, typer.Option(help="bf16, int8 or fp8.")] = "bf16",
    attention: Annotated[
        str | None,
        typer.Option(
            help="Precision of attention: bf16, int8_qk, int8_qk_fp8_v or fp8; by default as FastConfig's on an H100."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"Peaks to plan with: {', '.join(GPUS)}.")] = "h100",
    gpus: Annotated[
        int, typer.Option(min=1, help="Cards that share the clip's sequence; times, bytes and memory are of one.")
    ] = 1,
    shard_weights: Annotated[
        bool, typer.Option("--shard-weights", help="With --gpus: each card keeps a share of the weights.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="8")] = None,
    video_share: Annotated[
        float | None,
        typer.Option(help="Share of video pairs that every layer computes (0 to 1), in place of the exact masks."),
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Trace the forward pass under fake tensors for its peak memory (seconds).")
    ] = True,
    pipeline: Annotated[
        bool,
        typer.Option("--pipeline", help="Plan the whole path of the public checkpoints instead, from prompt to mp4."),
    ] = False,
    stages: Annotated[int, typer.Option(help="Of the whole path: 2, or 1 without super-resolution.")] = 2,
    first: Annotated[str, typer.Option(help="Of the whole path, first stage: distilled or base.")] = "distilled",
    decoder: Annotated[str, typer.Option(help="Of the whole path: turbo or wan.")] = "turbo",
    as_json: JsonOption = False,
) -> None:
    """Parameters, tokens, FLOPs, bytes and floor time per operation, and peak memory of one clip.

    With --pipeline: memory and floor time of every stage from a prompt to an mp4, and what fits which card.
    """
    misplaced = given(context, _ONE_MODEL if pipeline else _WHOLE_PATH)
    if misplaced and not pipeline:
        raise ValueError(f"{misplaced[0]} must come with --pipeline, got none")
    if pipeline:
        if misplaced:
            raise ValueError(
                f"{misplaced[0]} must be left out with --pipeline, which plans the public checkpoints as they are"
            )
        if fps not in (None, 25):
            raise ValueError(f"fps must be 25 with --pipeline, which is what the public checkpoints mean; got {fps}")
        from happyhorse_fast.cli.plan_pipeline import plan_pipeline

        plan_pipeline(context.params)
        return
    from happyhorse_fast.eager.sizes import parameters
    from happyhorse_fast.fast.launches import launches_per_layer

    preset, steps = preset or PRESET, 8 if steps is None else steps
    fps = fps_of(preset) if fps is None else fps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    config, clip, card = ModelConfig.preset(preset), tokens_for(resolution, aspect, seconds, fps), gpu_named(gpu)
    config.require_ranks(gpus)
    if shard_weights and gpus == 1:
        raise ValueError("--shard-weights must come with --gpus of at least 2, got 1")
    if attention is None:
        attention = default_attention(precision)
    how: dict[str, Any] = {"precision": precision, "attention": attention}
    costs = step_costs(config, clip, text=text, gpu=card, video_share=video_share, gpus=gpus, **how)
    total = totals(costs)
    window_layers = sum(config.is_local(i, clip.frame_tokens) for i in range(config.num_layers))
    window_share = window_share_of(clip.T // PATCH[0], config.frame_receptive_field) if window_layers else None
    data = {
        "preset": preset,
        "resolution": resolution,
        "aspect": aspect,
        "seconds": seconds,
        "fps": fps,
        "parameters": parameters(config),
        "tokens": {
            "latent": [clip.T, clip.H, clip.W],
            "video": clip.video,
            "audio": clip.audio,
            "text": text,
            "total": clip.total(text),
            "window_share": window_share,
            "window_layers": window_layers,
            "video_share": video_share,
        },
        **how,
        "gpu": card,
        "gpus": gpus,
        "steps": steps,
        "ops": costs,
        "totals": total | {"floor_s": steps * total["floor_ms_per_step"] / 1e3},
        "exchange": None if gpus == 1 else _exchange(config, clip, gpus, costs, text=text, **how),
        "launches_per_layer": max(map(len, launches_per_layer(FastConfig(precision=precision)))),  # type: ignore[arg-type]
        **_memory(config, clip, attention, context.params),
    }
    emit(data, as_json, _shown(data))


def _exchange(config: ModelConfig, clip: ClipTokens, gpus: int, costs: list[OpCost], **how: Any) -> dict[str, Any]:
    of_layer = layer_exchange(config, clip, gpus, **how)
    beside = sum(c.count * c.floor_ms for c in costs if c.op == "attention") / 1e3 / config.num_layers
    links = []
    for link in LINKS:
        whole, exposed = (config.num_layers * s * 1e3 for s in of_layer.seconds(link, beside))
        links.append({"link": link, "ms_per_step": whole, "exposed_ms_per_step": exposed})
    return {"bytes_per_step": config.num_layers * of_layer.bytes, "links": links}


def _memory(config: ModelConfig, clip: ClipTokens, attention: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    from happyhorse_fast.fast.memory import peak_memory, sharded_bytes
    from happyhorse_fast.verify.forms import FORMS

    gpus, form = asked["gpus"], next(form for form in FORMS if form.kernels and form.precision == asked["precision"])
    if not asked["memory"]:
        return {"peak_memory_gib": None, "memory": {"form": form.name, "why": "not traced (--no-memory)"}}
    print("tracing one forward pass under fake tensors...", file=sys.stderr)
    model = form.without_weights(config, attention)  # type: ignore[arg-type]  # checked before
    # The last rank holds the dummies, the first none.
    peaks = [peak_memory(model, clip, asked["text"], gpus=gpus, rank=rank) for rank in {0, gpus - 1}]
    peak = max(peaks, key=lambda peak: peak.peak_bytes)
    held, gathered = sharded_bytes(model, gpus) if asked["shard_weights"] else (peak.weight_bytes, 0)
    whole = peak.peak_bytes - peak.weight_bytes + held + gathered
    sizes = {"held_weight_bytes": held, "gathered_weight_bytes": gathered, "fits_gb": cards_for(whole)}
    return {"peak_memory_gib": whole / 2**30, "memory": {"form": form.name, "why": None, **sizes, "peak": peak}}


def _shown(data: dict[str, Any]) -> Shown:
    counted, tokens, total, card = data["parameters"], data["tokens"], data["totals"], data["gpu"]
    yield literal(
        (data["preset"], "bold"),
        f", {data['resolution']} {data['aspect']}, {data['seconds']} s at {data['fps']} fps: "
        f"{counted['total'] / 1e9:.1f} B parameters, {counted['active_per_token'] / 1e9:.1f} B active per token, "
        f"weights {gib(counted['bytes'])} as published",
    )
    yield (
        f"latent {'x'.join(map(str, tokens['latent']))}; {tokens['video']:,} video + {tokens['audio']:,} audio + "
        f"{tokens['text']:,} text = {tokens['total']:,} tokens; {_masks(tokens)}\n"
    )
    yield _floor_table(data["ops"], card, data["precision"], data["attention"])
    yield _traffic_table(data["ops"])
    yield literal(
        f"one step: linear {number(total['linear_flops'], 'FLOP')}, attention "
        f"{number(total['attention_flops'], 'FLOP')}, {number(total['bytes'], 'B')}; floor "
        f"{total['floor_ms_per_step'] / 1e3:.2f} s, {data['steps']} steps ",
        (f"{total['floor_s']:.1f} s", "bold"),
    )
    if data["exchange"] is not None:
        yield f"each of {data['gpus']} cards sends {_exchanged(data['exchange'])} a step"
    memory = data["memory"]
    if data["peak_memory_gib"] is None:
        yield f"peak memory: not known, {memory['why']}"
        return
    peak = memory["peak"]
    gathered = f" and {gib(memory['gathered_weight_bytes'])} gathered" if memory["gathered_weight_bytes"] else ""
    form = memory["form"] + (f", attention in {data['attention']}" if data["attention"] != data["precision"] else "")
    yield literal(
        f"peak memory, {form}: ",
        (f"{data['peak_memory_gib']:.1f} GiB", "bold"),
        f", of it weights {gib(memory['held_weight_bytes'])}{gathered}; reached by {peak.operation}; "
        f"fits a card of {', '.join(map(str, memory['fits_gb'])) or 'more than ' + str(CARDS[-1])} GB",
    )


def _exchanged(exchange: dict[str, Any]) -> str:
    links = [
        f"{x['ms_per_step']:.0f} ms over {x['link'].name}, {x['exposed_ms_per_step']:.0f} of them not beside attention"
        for x in exchange["links"]
    ]
    return f"{number(exchange['bytes_per_step'], 'B')} ({'; '.join(links)})"


def _masks(tokens: dict[str, Any]) -> str:
    if tokens["video_share"] is not None:
        return f"{tokens['video_share']:.0%} of video pairs in every layer"
    if not tokens["window_layers"]:
        return "every layer dense"
    return f"window keeps {tokens['window_share']:.0%} of video pairs in {tokens['window_layers']} layers"


def _floor_table(ops: list[OpCost], card: Any, precision: str, attention: str) -> Any:
    names = ["norms", "qkv", "attention", "proj", "up", "down"]
    kinds = {c.kind: c.count for c in ops if c.kind != OUTSIDE}
    by = {(c.kind, c.op): c.floor_ms for c in ops}
    rows = []
    for kind, count in kinds.items():
        times = [by[kind, name] for name in names]
        rows.append(
            [kind, str(count), *(f"{t:.2f}" for t in times), f"{sum(times):.1f}", f"{count * sum(times) / 1e3:.3f}"]
        )
    outside = sum(c.floor_ms for c in ops if c.kind == OUTSIDE)
    rows.append(["embedders, heads", "", *[""] * len(names), f"{outside:.1f}", f"{outside / 1e3:.3f}"])
    what = f"{precision} {card.rate(precision) / 1e12:g} TFLOP/s"
    if attention != precision:
        what += f", attention in {attention} {card.rate(attention) / 1e12:.4g} TFLOP/s"
    title = f"floor on {card.name}, ms per layer ({what}, {card.bandwidth:g} TB/s; {card.source}); s per step"
    return table(title, ["layer", "count", *names, "layer ms", "step s"], rows)


def _traffic_table(ops: list[OpCost]) -> Any:
    rows = []
    for op in dict.fromkeys(c.op for c in ops):
        same = [c for c in ops if c.op == op]
        flops, moved = sum(c.count * c.flops for c in same), sum(c.count * c.bytes for c in same)
        floor = sum(c.count * c.floor_ms for c in same)
        rows.append([op, number(flops, "FLOP"), number(moved, "B"), f"{flops / moved:,.0f}", f"{floor / 1e3:.3f}"])
    return table("one step, all layers", ["operation", "FLOPs", "bytes", "FLOP/B", "floor s"], rows)
