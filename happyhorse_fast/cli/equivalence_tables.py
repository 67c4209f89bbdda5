"""Tables of an equivalence report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from happyhorse_fast.cli.equivalence import ATTENTION, Distance, Equivalence, FormErrors
from happyhorse_fast.cli.layer_ops import OPS
from happyhorse_fast.cli.output import literal, table

if TYPE_CHECKING:
    from rich.console import Console

MODALITIES = ("video", "audio")


def render(console: Console, found: list[Equivalence]) -> None:
    """Print every case: relative L2 and worst tile per op and layer, then all measures end to end."""
    for case in found:
        video, audio, text = case.tokens
        backends = sorted({backend for form in case.forms for backend in form.backends})
        console.print(
            literal(
                (case.case, "bold"),
                f": {case.layers} layers of {case.hidden_size}, {video:,} video + {audio:,} audio + {text:,} text "
                f"tokens, on {case.device}, fast forms on {', '.join(backends)}"
                f"{f'; sparsity {case.sparsity}' if case.sparsity else ''}",
            )
        )
        console.print(_by_place(case, "relative L2 to float32", lambda d: f"{d.relative_l2:.2e}"))
        console.print(
            _by_place(case, "worst 128x128 tile, 1 - 2<x,y>/(|x|^2+|y|^2)", lambda d: f"{d.tile_distance:.1e}")
        )
        if case.attention_formats:
            console.print(_attention(case))
        console.print(_end_to_end(case))
        for form in case.forms:
            for violation in form.violations:
                console.print(literal((f"{form.form}: {violation}", "red")))
    console.print(
        literal(
            "op: each on its float32 input, worst layer; layer: the residual stream after it, errors of all layers "
            "before included; added: distance to the form before, in units of float32's norm"
        )
    )


def worst_op(form: FormErrors, op: str, modality: str) -> Distance:
    """An op's distance in the layer where it is largest."""
    errors = [e for what, e in form.errors.items() if what.startswith("op.") and what.endswith(f".{op}.{modality}")]
    return max(errors, key=lambda e: e.relative_l2)


def _by_place(case: Equivalence, title: str, cell: Callable[[Distance], str]) -> Any:
    columns = [f"{form.form}: {modality}" for form in case.forms for modality in MODALITIES]
    rows = []
    for op in OPS:
        cells = [cell(worst_op(form, op, modality)) for form in case.forms for modality in MODALITIES]
        rows.append([f"op {op}", *cells])
    for place in (f"layer.{i}" for i in range(case.layers)):
        cells = [cell(form.errors[f"{place}.{modality}"]) for form in case.forms for modality in MODALITIES]
        rows.append([place.replace(".", " "), *cells])
    return table(title, ["after", *columns], rows)


def _attention(case: Equivalence) -> Any:
    places = [f"{precision}.{modality}" for precision in ATTENTION for modality in MODALITIES]
    rows = [
        [f"layer {found.layer}", *(f"{found.errors[place]:.2e}" for place in places), found.softmax]
        for found in case.attention_formats
    ]
    columns = ["attention of", *(place.replace(".", ": ") for place in places), "by its weights"]
    title = "attention alone in every format, relative L2 to float32 (plain torch, the kernels' rounding)"
    return table(title, columns, rows, folded=[len(columns) - 1])


def _end_to_end(case: Equivalence) -> Any:
    columns = ["result", "form", "relative L2", "added", "lost to", "1 - cosine", "worst tile", "PSNR dB"]
    return table("end to end", columns, list(_end_rows(case)), left=2)


def _end_rows(case: Equivalence) -> Iterator[list[str]]:
    for what in case.forms[0].errors:
        if not what.startswith(("velocity", "latent")):
            continue
        for form in case.forms:
            e = form.errors[what]
            psnr = "" if e.psnr_db is None else f"{e.psnr_db:.1f}"
            numbers = [f"{1 - e.cosine:.1e}", f"{e.tile_distance:.1e}", psnr]
            # No kernel has run then, only the places where one would round.
            step = "rounding" if form.step == "kernels" and form.backends == ("reference",) else form.step
            yield [what.replace(".", ", "), form.form, f"{e.relative_l2:.2e}", f"{e.own:.2e}", step, *numbers]
