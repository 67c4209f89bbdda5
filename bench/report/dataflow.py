"""The launches of a layer with the tensors between them, as a flowchart and as a table: seen while a small model runs.

Shapes are of letters: each size of the small model is another number, so that a dimension's number says which it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.table import Table
from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision

FORMS: dict[Precision, AttentionPrecision] = {"bf16": "bf16", "int8": "int8_qk", "fp8": "fp8"}
"""Precision of the products -> of attention, as shown."""
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
BEFORE, AFTER = "the layer before", "the next layer"
OPS = {
    BEFORE: "", "norm 1": "rmsnorm_quantize", "qkv": "qkv_linear", "attention": "block_sparse_attention",
    "codes 1": "quantize_rows", "proj": "fp8_linear_residual", "norm 2": "rmsnorm_quantize",
    "up": "fp8_linear_activation", "codes 2": "quantize_rows", "down": "fp8_linear_residual",
}  # fmt: skip
"""Steps of a layer in order -> their ops."""
DTYPES = {torch.bfloat16: "bf16", torch.float32: "float32", torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


@dataclass
class Made:
    """A tensor that a launch writes.

    Attributes:
        step: The launch, by its step in the layer.
        name: As the op's contract calls it.
        shape: In letters.
        dtype: In words.
        readers: Steps that read it.
    """

    step: str
    name: str
    shape: str
    dtype: str
    readers: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Notes what launches of this package's ops write, in order, and which launches read it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []
        self._at: dict[int, tuple[Made, Tensor]] = {}  # which keeps the tensor, so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        op = func._schema.name.partition("::")[2].removesuffix("_reference")
        if op in RESULTS:
            if not self.made:
                self._note(BEFORE, "hidden", args[0])
            step = next(step for step, of in OPS.items() if of == op and step not in {made.step for made in self.made})
            for given in args:
                if isinstance(given, Tensor) and (at := self._at.get(given.untyped_storage().data_ptr())):
                    at[0].readers.append(step)
            new = (args[-1],) if op == "fp8_linear_residual" else results
            for name, x in zip(RESULTS[op], new if isinstance(new, tuple) else (new,), strict=True):
                if x.numel():
                    self._note(step, name, x)
        return results

    def _note(self, step: str, name: str, x: Tensor) -> None:
        made = Made(step, name, f"[{', '.join(LETTERS[size] for size in x.shape)}]", DTYPES[x.dtype])
        self._at[x.untyped_storage().data_ptr()] = made, x
        self.made.append(made)


@functools.cache
def written(precision: Precision) -> tuple[Made, ...]:
    """Record what the launches of a layer without sparsity write, in order, after what the layer before wrote."""
    fast = FastConfig(precision=precision, attention=FORMS[precision], backend="reference")
    model = accelerate(HappyHorse(CONFIG).init_weights(0), fast)
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 48, 4, 16, 32), (1, 13, 64), (1, 6, CONFIG.text_in_channels))
    recorder = Recorder()
    with torch.no_grad(), recorder:
        model(*(torch.randn(shape, generator=draw) for shape in shapes))
    return tuple(recorder.made)


def tensors() -> dict[tuple[str, str], dict[Precision, Made]]:
    """What launches write, by launch and name, in order; each by the forms that have it."""
    found: dict[tuple[str, str], dict[Precision, Made]] = {}
    for precision in FORMS:
        for made in written(precision):
            found.setdefault((made.step, made.name), {})[precision] = made
    return dict(sorted(found.items(), key=lambda item: list(OPS).index(item[0][0])))


def shape_of(forms: dict[Precision, Made]) -> str:
    """Shape of a tensor, or its shapes."""
    return " or ".join(dict.fromkeys(made.shape for made in forms.values()))


def readers_of(forms: dict[Precision, Made]) -> list[str]:
    """Launches that read a tensor in some form."""
    return list(dict.fromkeys(reader for made in forms.values() for reader in made.readers)) or [AFTER]


def flowchart() -> str:
    """Steps from above, at the arrows the tensors between them, in Mermaid."""
    found = tensors()
    names = {step: f"step{i}" for i, step in enumerate((*OPS, AFTER))}
    arrows: dict[tuple[str, str], list[str]] = {}
    forms: dict[str, set[str]] = {}
    for (writer, name), by in found.items():
        forms.setdefault(writer, set()).update(by)
        for reader in readers_of(by):
            arrows.setdefault((writer, reader), []).append(f"{name} {shape_of(by)}")
    lines = ["```mermaid", "flowchart TD"]
    for step, name in names.items():
        op = f": {OPS[step]}" if OPS.get(step) else ""
        alone = "".join(f", in {form} alone" for form in forms.get(step, ()) if len(forms[step]) == 1)
        lines.append(f'    {name}["{step}{op}{alone}"]')
    for (writer, reader), labels in arrows.items():
        lines.append(f'    {names[writer]} -->|"{"<br/>".join(labels)}"| {names[reader]}')
    return "\n".join([*lines, "```"])


def table() -> Table:
    """Every tensor that one launch writes and another reads, by form."""
    rows = []
    for (step, name), by in tensors().items():
        dtypes = (by[precision].dtype if precision in by else "" for precision in FORMS)
        writer = f"{step}: `{OPS[step]}`" if OPS[step] else step
        rows.append((writer, name, shape_of(by), *dtypes, ", ".join(readers_of(by))))
    forms = (f"{precision}, attention {attention}" for precision, attention in FORMS.items())
    note = (
        "N: rows of the padded sequence, S: its blocks of 128, C: hidden size, U: width of the MLP. The steps codes 1 "
        "and codes 2 are in int8 alone. Scales of e4m3 that are known ahead, of attention's output and of the "
        "activation, are written by torch."
    )
    return Table("Tensors between launches", ("written by", "tensor", "shape", *forms, "read by"), tuple(rows), note)
