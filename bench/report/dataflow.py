"""The launches of a layer in order, with the tensors between them: seen while a small model runs, drawn and listed.

Shapes are of letters: each size of the small model is another number, so that a dimension's number says which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.report.lanes import BLUE, GREEN, ORANGE, VIOLET, document
from bench.results import ROOT
from bench.table import Table
from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision

FIGURE = ROOT / "docs" / "layer.svg"
FORMS: dict[Precision, AttentionPrecision] = {"bf16": "bf16", "int8": "int8_qk", "fp8": "fp8"}
"""Precision of the products -> of attention, as drawn."""
CONFIG = ModelConfig(
    num_layers=1, hidden_size=448, head_dim=32, num_heads_q=10, num_heads_kv=5, text_in_channels=8,
    mm_layers=(), gelu7_layers=(), local_attn_layers=(),
)  # fmt: skip
WIDTH = CONFIG.intermediate_size(0) + -CONFIG.intermediate_size(0) % 64
ROWS = 6 * BLOCK
"""Four latent frames of 128 tokens, audio and text, each padded to a block."""
LETTERS = {
    ROWS: "N", CONFIG.hidden_size: "C", CONFIG.head_dim: "D", CONFIG.num_heads_q: "Hq", CONFIG.num_heads_kv: "Hkv",
    ROWS // BLOCK: "S", CONFIG.num_heads_q * CONFIG.head_dim: "Hq D", WIDTH: "U", 1: "1",
}  # fmt: skip
RESULTS = {
    "rmsnorm_quantize": ("x", "x_scale"),
    "qkv_linear": ("q", "k", "v", "q_scale", "k_scale", "v_scale", "gate"),
    "block_sparse_attention": ("out", "lse"),
    "quantize_rows": ("codes", "scale"),
    "fp8_linear_activation": ("y",),
    "fp8_linear_residual": ("hidden",),
}
"""An op of a layer -> what it writes."""
STEPS = {
    "rmsnorm_quantize": ("norm 1", "norm 2"), "qkv_linear": ("qkv",), "block_sparse_attention": ("attention",),
    "quantize_rows": ("codes 1", "codes 2"), "fp8_linear_residual": ("proj", "down"), "fp8_linear_activation": ("up",),
}  # fmt: skip
"""An op -> names of its launches in a layer."""
ORDER = ("norm 1", "qkv", "attention", "codes 1", "proj", "norm 2", "up", "codes 2", "down")
DTYPES = {torch.bfloat16: "bf16", torch.float32: "float32", torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


@dataclass
class Made:
    """A tensor that a launch writes.

    Attributes:
        name: As the op's contract calls it.
        shape: In letters.
        dtype: In words.
        readers: Steps that read it.
    """

    name: str
    shape: str
    dtype: str
    readers: list[str] = field(default_factory=list)


@dataclass
class Launch:
    """One launch: its step in the layer, its op, and what it writes."""

    step: str
    op: str
    writes: list[Made]


class Recorder(TorchDispatchMode):
    """Notes the launches of this package's ops, and which tensors go from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._made: dict[int, Made] = {}
        self._kept: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        op = func._schema.name.partition("::")[2].removesuffix("_reference")
        self._kept += [args, results]
        if op in RESULTS:
            step = STEPS[op][sum(launch.op == op for launch in self.launches)]
            for given in args:
                if isinstance(given, Tensor) and (made := self._made.get(given.untyped_storage().data_ptr())):
                    made.readers.append(step)
            written = (args[-1],) if op == "fp8_linear_residual" else results
            named = zip(RESULTS[op], written if isinstance(written, tuple) else (written,), strict=True)
            self.launches.append(Launch(step, op, [self._note(name, x) for name, x in named if x.numel()]))
        return results

    def _note(self, name: str, x: Tensor) -> Made:
        made = Made(name, f"[{', '.join(LETTERS[size] for size in x.shape)}]", DTYPES[x.dtype])
        self._made[x.untyped_storage().data_ptr()] = made
        return made


@functools.cache
def launches(precision: Precision) -> tuple[Launch, ...]:
    """Record the launches of a layer without sparsity, in order; the next layer reads what the last one writes."""
    fast = FastConfig(precision=precision, attention=FORMS[precision], backend="reference")
    model = accelerate(HappyHorse(CONFIG).init_weights(0), fast)
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 48, 4, 16, 32), (1, 13, 64), (1, 6, CONFIG.text_in_channels))
    recorder = Recorder()
    with torch.no_grad(), recorder:
        model(*(torch.randn(shape, generator=draw) for shape in shapes))
    return tuple(recorder.launches)


def table() -> Table:
    """Every tensor that one launch writes and another reads, by form."""
    found: dict[tuple[str, str], dict[str, Made]] = {}
    ops: dict[str, str] = {}
    for precision in FORMS:
        for launch in launches(precision):
            ops[launch.step] = launch.op
            for made in launch.writes:
                found.setdefault((launch.step, made.name), {})[precision] = made
    rows = []
    for step, name in sorted(found, key=lambda key: ORDER.index(key[0])):
        by = found[step, name]
        shapes = " or ".join(dict.fromkeys(made.shape for made in by.values()))
        readers = dict.fromkeys(reader for made in by.values() for reader in made.readers) or ["the next layer"]
        dtypes = (by[precision].dtype if precision in by else "" for precision in FORMS)
        rows.append((f"{step}: `{ops[step]}`", name, shapes, *dtypes, ", ".join(readers)))
    forms = (f"{precision}, attention {attention}" for precision, attention in FORMS.items())
    note = (
        "N: rows of the padded sequence, S: its blocks of 128, C: hidden size, U: width of the MLP. The steps codes 1 "
        "and codes 2 are in int8 alone. Scales of e4m3 that are known ahead, of attention's output and of the "
        "activation, are written by torch."
    )
    return Table("Tensors between launches", ("written by", "tensor", "shape", *forms, "read by"), tuple(rows), note)


# The figure -----------------------------------------------------------------------------------------------------------

COLUMN, ROW, BOX, TOP, STREAM = 392, 92, 34, 76, 26
COLOURS = {"rmsnorm_quantize": GREEN, "block_sparse_attention": ORANGE, "quantize_rows": VIOLET}


def svg() -> str:
    """A column per form: launches from above, tensors between them, the residual stream at their left."""
    parts = [part for i, precision in enumerate(FORMS) for part in _column(precision, COLUMN * i + 16)]
    return document(COLUMN * len(FORMS) + 20, TOP + ROW * len(ORDER) + 10, parts)


def _column(precision: Precision, left: int) -> Iterator[str]:
    yield _text(left, 24, f"{precision}, attention {FORMS[precision]}: {len(launches(precision))} launches", 15)
    foot = TOP + ROW * (len(ORDER) - 1) + BOX
    yield f'<rect x="{left}" y="{TOP}" width="{STREAM}" height="{foot - TOP}" fill="#e8ebef"/>'
    yield _text(left, TOP - 12, "hidden [N, C] float32: the residual stream", 12)
    box = left + STREAM + 28
    for launch in launches(precision):
        y = TOP + ROW * ORDER.index(launch.step)
        middle = y + BOX / 2
        colour = COLOURS.get(launch.op, BLUE)
        yield f'<rect x="{box}" y="{y}" width="210" height="{BOX}" rx="4" fill="{colour}" fill-opacity="0.88"/>'
        yield _text(box + 10, middle + 4, f"{launch.op}: {launch.step}", 12, "#fff")
        if launch.op == "rmsnorm_quantize":
            yield _line(left + STREAM, middle, box - 2, middle)
        if launch.op == "fp8_linear_residual":
            yield _line(box, middle, left + STREAM + 2, middle)
            continue
        reader = launch.writes[0].readers[0]
        yield _line(box + 14, y + BOX, box + 14, TOP + ROW * ORDER.index(reader) - 2)
        by_dtype: dict[str, list[str]] = {}
        for made in launch.writes:
            by_dtype.setdefault(made.dtype, []).append(f"{made.name} {made.shape}")
        for i, (dtype, names) in enumerate(by_dtype.items()):
            yield _text(box + 24, y + BOX + 18 + 15 * i, f"{dtype}: {', '.join(names)}", 11, "#333")


def _text(x: float, y: float, text: str, size: int, fill: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}">{text}</text>'


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="#333" stroke-width="1.3" marker-end="url(#tip)"/>'
