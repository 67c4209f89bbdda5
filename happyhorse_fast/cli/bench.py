"""``happyhorse-fast bench``: where the time of a step goes on this machine, op by op, in every form there is.

A layer of each kind of a preset's is made with random weights and run on a clip, so that 15B models fit small cards.
Each op is timed inside the forward pass, as it is called there; peers, cold caches and tuning are the source
checkout's ``make bench`` and ``make gpu``, which are not installed. Kernels are timed only after their self-check.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.cli.forms import FORMS, Form
from happyhorse_fast.cli.options import DeviceOption, usable_device
from happyhorse_fast.cli.output import JsonOption, emit, literal, table
from happyhorse_fast.config import PATCH, ModelConfig
from happyhorse_fast.costs import OUTSIDE, step_costs
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens, tokens_for

if TYPE_CHECKING:
    import torch
    from rich.console import Console

# What an op of the package is called in happyhorse_fast.costs; the residual products are two of those.
_COSTED = {
    "block_sparse_attention": ("attention",),
    "fp8_linear_activation": ("up",),
    "fp8_linear_residual": ("proj", "down"),
    "qkv_linear": ("qkv",),
    "attention": ("attention",),
    "products": ("qkv", "proj", "up", "down"),  # of an eager pass; in an accelerated one they are outside the layers
}
_SEED = 0


def bench(
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(ModelConfig.preset_names())}; the 15B one on a GPU, else tiny."),
    ] = None,
    resolution: Annotated[str | None, typer.Option(help="1080p, 540p or 256p; 1080p on a GPU, else 256p.")] = None,
    seconds: Annotated[int, typer.Option(help="Length, 3 to 15.")] = 3,
    text: Annotated[int, typer.Option(help="Text tokens.")] = TEXT_TOKENS,
    attention: Annotated[
        str | None,
        typer.Option(help="Of the fast forms: attention in bf16, int8_qk or fp8; left out, FastConfig's default."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Forward passes that are timed.")] = 3,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time of every op inside a forward pass of one layer of each kind, eager and accelerated."""
    where = usable_device(device)
    on_gpu = where.startswith("cuda")
    preset = preset or ("happyhorse-1.0-15b" if on_gpu else "tiny")
    resolution = resolution or ("1080p" if on_gpu else "256p")
    clip = tokens_for(resolution, "16:9", seconds)
    data = measure(preset, clip, text=text, attention=attention, repeats=repeats, device=where)
    data = {"preset": preset, "resolution": resolution, "seconds": seconds, **data}
    emit(data, as_json, lambda console: _render(console, data))


def measure(
    preset: str, clip: ClipTokens, *, text: int, repeats: int, device: str, attention: str | None = None
) -> dict[str, Any]:
    """What :func:`bench` prints, as plain data.

    Args:
        preset: The model.
        clip: Latent size.
        text: Text tokens.
        repeats: Forward passes per form.
        device: Where to run.
        attention: Precision of attention of the fast forms; None: each form's default.

    Raises:
        ValueError: An argument is out of range.
    """
    import torch

    from happyhorse_fast.model.memory import one_layer_per_kind

    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    where = torch.device(device)
    config = one_layer_per_kind(ModelConfig.preset(preset), clip)
    forms = [form for form in FORMS if form.precision != "fp32"]
    if where.type == "cuda" and torch.cuda.get_device_capability(where) < (8, 9):
        forms = [form for form in forms if form.precision != "fp8"]
    return {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "layers": config.num_layers,
        "tokens": clip.total(text),
        "repeats": repeats,
        "forms": [_form(form, config, clip, text, (attention, repeats), where) for form in forms],
    }


def _form(
    form: Form, config: ModelConfig, clip: ClipTokens, text: int, how: tuple[str | None, int], device: torch.device
) -> dict[str, Any]:
    import torch

    from happyhorse_fast.model.op_times import OpTimes

    asked, repeats = how
    eager = form.eager(config, str(device)).init_weights(_SEED)
    model = form.apply(eager, asked)  # type: ignore[arg-type]  # FastConfig checks it
    state: Any = getattr(model, "fast", None)
    draw = torch.Generator(device).manual_seed(_SEED)
    inputs = [
        torch.randn(shape, generator=draw, device=device)
        for shape in (
            (1, config.latent_channels, clip.T // PATCH[0], clip.H, clip.W),
            (1, clip.audio, config.audio_in_channels),
            (1, text, config.text_in_channels),
        )
    ]
    passes, calls = [], {}
    with torch.no_grad():
        model(*inputs)  # compiles, and makes what depends on the clip's shape
        for _ in range(repeats):
            with OpTimes(device) as times:
                model(*inputs)
            passes.append(times.seconds())
            calls = times.calls()
    flops = _flops(config, clip, text)
    ops = []
    for name in passes[0]:
        taken = statistics.median(each.get(name, 0.0) for each in passes)
        parts = _COSTED.get(name, ())
        if name == "products":  # without a fused kernel, attention is two of them
            parts = () if state is not None else parts if "attention" in passes[0] else (*parts, "attention")
        done = sum(flops[part] for part in parts)
        ops.append(
            {
                "op": name,
                "backend": state.choices[name].backend if state is not None and name in state.choices else "torch",
                "calls": calls[name],
                "ms": 1e3 * taken,
                "tflops": done / taken / 1e12 if done and taken else None,
            }
        )
    fallbacks = sorted({c.reason for c in state.choices.values() if c.fell_back}) if state is not None else []
    total = statistics.median(sum(each.values()) for each in passes)
    layers: Any = model.block.layers
    attention = None if state is None else layers[0].plan.precision["attention"]
    return {"form": form.name, "attention": attention, "ms": 1e3 * total, "ops": ops, "fallbacks": fallbacks}


def _flops(config: ModelConfig, clip: ClipTokens, text: int) -> dict[str, float]:
    flops: dict[str, float] = {}
    for cost in step_costs(config, clip, text=text):
        if cost.kind != OUTSIDE:
            flops[cost.op] = flops.get(cost.op, 0.0) + cost.count * cost.flops
    return flops


def _render(console: Console, data: dict[str, Any]) -> None:
    console.print(
        literal(
            (data["preset"], "bold"),
            f", {data['layers']} layers (one of each kind), {data['resolution']} {data['seconds']} s, "
            f"{data['tokens']:,} tokens, on {data['device']}, torch {data['torch']}\n",
        )
    )
    for form in data["forms"]:
        rows = [
            [op["op"], op["backend"], str(op["calls"]), f"{op['ms']:.3f}", f"{op['ms'] / form['ms']:.0%}", _rate(op)]
            for op in form["ops"]
        ]
        within = f", attention in {form['attention']}" if form["attention"] else ""
        title = f"{form['form']}{within}: {form['ms']:.2f} ms a pass"
        console.print(table(title, ["op", "runs as", "calls", "ms", "share", "useful TFLOP/s"], rows, left=2))
        for reason in form["fallbacks"]:
            console.print(literal(f"slower than it could be: {reason}"))


def _rate(op: dict[str, Any]) -> str:
    return "" if op["tflops"] is None else f"{op['tflops']:.3g}"
