"""``happyhorse-fast bench``: time a forward pass on this machine, op by op, in every form of the model.

A layer of each kind of a preset's is made with random weights and run on a clip, so that 15B models fit small cards.
Each op is timed inside the forward pass, as it is called there; peers, cold caches and tuning are the source
checkout's ``make bench`` and ``make gpu``, which are not installed. Kernels are timed only after their self-check.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.cli.options import AttentionOption, DeviceOption, usable_device
from happyhorse_fast.cli.output import JsonOption, Shown, emit, literal, table
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.tokens import TEXT_TOKENS, tokens_for

if TYPE_CHECKING:
    from happyhorse_fast.verify.op_times import FormTimes


def bench(
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(ModelConfig.preset_names())}; the 15B one on a GPU, else tiny."),
    ] = None,
    resolution: Annotated[str | None, typer.Option(help="1080p, 540p or 256p; 1080p on a GPU, else 256p.")] = None,
    seconds: Annotated[int, typer.Option(help="Length, 3 to 15.")] = 3,
    text: Annotated[int, typer.Option(help="Text tokens.")] = TEXT_TOKENS,
    attention: AttentionOption = None,
    repeats: Annotated[int, typer.Option(help="Forward passes that are timed.")] = 3,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time of every op inside a forward pass of one layer of each kind, eager and accelerated."""
    import torch

    from happyhorse_fast.fast.memory import one_layer_per_kind
    from happyhorse_fast.verify import op_times

    where = torch.device(usable_device(device))
    on_gpu = where.type == "cuda"
    preset = preset or ("happyhorse-1.0-15b" if on_gpu else "tiny")
    resolution = resolution or ("1080p" if on_gpu else "256p")
    clip = tokens_for(resolution, "16:9", seconds)
    config = one_layer_per_kind(ModelConfig.preset(preset), clip)
    how: dict[str, Any] = {"attention": attention, "repeats": repeats, "device": where}  # checked there
    if not as_json:
        how["report"] = lambda form: print(f"timing {form}...", file=sys.stderr)
    data = {
        "preset": preset,
        "resolution": resolution,
        "seconds": seconds,
        "device": torch.cuda.get_device_name(where) if on_gpu else "cpu",
        "torch": torch.__version__,
        "layers": config.num_layers,
        "tokens": clip.total(text),
        "repeats": repeats,
        "forms": op_times.time_forms(config, clip, text=text, **how),
    }
    emit(data, as_json, _shown(data))


def _shown(data: dict[str, Any]) -> Shown:
    yield literal(
        (data["preset"], "bold"),
        f", {data['layers']} layers (one of each kind), {data['resolution']} {data['seconds']} s, "
        f"{data['tokens']:,} tokens, on {data['device']}, torch {data['torch']}\n",
    )
    forms: list[FormTimes] = data["forms"]
    for form in forms:
        rows = [
            [
                op.op,
                op.backend,
                str(op.calls),
                f"{op.ms:.3f}",
                f"{op.ms / form.ms:.0%}",
                "" if op.tflops is None else f"{op.tflops:.3g}",
            ]
            for op in form.ops
        ]
        within = f", attention in {form.attention}" if form.attention else ""
        title = f"{form.form}{within}: {form.ms:.2f} ms a pass"
        yield table(title, ["op", "runs as", "calls", "ms", "share", "useful TFLOP/s"], rows, left=2)
        yield from (f"slower than it could be: {reason}" for reason in form.fallbacks)
