"""Every launch that the committed tables allow, at the 15B model's shapes, on tensors of the device "meta".

A case calls the real launcher; what it launches is recorded by `bench.aot.recording`. Cases that specialise to the same
kernel, as one expert and three do, are compiled once.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from bench.hopper import FORM, HOPPER, running
from happyhorse_fast.kernels.launch import ARCHITECTURES, FP8_SINCE, HOPPER_ARCH, config_for, table
from happyhorse_fast.ops.qkv.contract import RESULTS, empty_qkv
from happyhorse_fast.ops.quantize import ATTENTION, BF16, DTYPES
from happyhorse_fast.ops.row_quantization.triton import variant_of
from happyhorse_fast.ops.runtime.dispatch import STEMS
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.triton.device import by_pointers, pretend
from happyhorse_fast.ops.runtime.triton.library import LAUNCHERS

for _folder in ("attention", "block_selection", "linear", "qkv"):
    importlib.import_module(f"happyhorse_fast.ops.{_folder}.triton")  # which adds to LAUNCHERS
ROWS, HIDDEN, HEADS_Q, HEADS_KV, HEAD_DIM = 64_256, 5120, 40, 8, 128
"""5 s at 1080p, 24 fps, padded to whole tiles; the 15B model's widths."""
UP, DOWN, GELU = 27_392, 13_696, 20_480
"""Features of the padded SwiGLU7 product, their half, and those of the GELU7 product."""
SHAPES = {"swiglu7": ((UP, HIDDEN),), "gelu7": ((GELU, HIDDEN),), "residual": ((HIDDEN, HIDDEN), (HIDDEN, DOWN))}
"""(F, K) where the model meets a product: up; proj; and down, of which SwiGLU7's alone is no multiple of 256."""
BLOCKS = (502, 1464)
"""Blocks of 128 tokens of 5 s and of 15 s at 1080p."""
HEAD_DIMS = (32, 64, 128)
EXPERTS = (1, 3)
F32, I32 = torch.float32, torch.int32


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        op: Name of the op without its namespace.
        arch: Pretended compute capability.
        variants: Kernel -> the entry of the table that it is launched with.
        products: Format of its products: a key of `aot_gates.PRODUCTS`.
        form: What tells it from the op's other cases.
        arguments: The launcher's, on the device "meta".
        pointers: Whether the launcher may make no descriptors, where it otherwise would.
        hopper: Whether the table is taken to ask for the Hopper kernel.
    """

    op: str
    arch: int
    variants: dict[str, str]
    products: str
    form: str
    arguments: dict[str, Any] = field(repr=False)
    pointers: bool = False
    hopper: bool = False

    @property
    def stem(self) -> str:
        """Stem of its launch table."""
        return STEMS[self.op]

    @property
    def detail(self) -> str:
        """Its form, and how it loads or in which kernel it runs where the table has two."""
        return f"{self.form}{', pointers' if self.pointers else ''}{', hopper' if self.hopper else ''}"

    def __str__(self) -> str:
        """What ``--only`` is matched with."""
        return f"sm_{self.arch} {self.op} {self.detail}"

    def launch(self) -> None:
        """Call the launcher, pretending the architecture."""
        loads = by_pointers() if self.pointers else contextlib.nullcontext()
        with pretend(self.arch), loads, running(HOPPER if self.hopper else "triton"):
            LAUNCHERS[f"happyhorse_fast::{self.op}"](**self.arguments)


def cases() -> Iterator[Case]:
    """All cases."""
    for arch in ARCHITECTURES:
        for make in (norms, row_codes, qkv_products, attentions, linears, selections):
            yield from make(arch)


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def formats(arch: int) -> tuple[str, ...]:
    """Formats of inputs that an architecture has."""
    return ("bf16", "int8", "fp8") if arch >= FP8_SINCE else ("bf16", "int8")


def loads(stem: str, variant: str, arch: int) -> tuple[bool, ...]:
    """``pointers``, False and True, where the table has descriptors; else only False."""
    return (False, True) if config_for(stem, variant, arch).descriptors else (False,)


def norms(arch: int) -> Iterator[Case]:
    """`rmsnorm_quantize`: every output, with a branch to add and without."""
    for fmt, branch, experts in itertools.product(formats(arch), (False, True), EXPERTS):
        arguments = {
            "hidden": meta(ROWS, HIDDEN),
            "norm_weight": meta(experts, HIDDEN),
            "row_tiles": meta(BLOCKS[0], 3, dtype=I32),
            "branch": meta(ROWS, HIDDEN, dtype=BF16) if branch else None,
            "out": fmt,
        }
        variants = {"rmsnorm_quantize_kernel": "rmsnorm_quantize"}
        detail = f"{fmt} out{', branch' if branch else ''}"
        yield Case("rmsnorm_quantize", arch, variants, "none", detail, arguments)


def row_codes(arch: int) -> Iterator[Case]:
    """`quantize_rows`: every width of the table, the model's where it has one, as they are and through a Hadamard."""
    for channels, through in itertools.product((4096, HIDDEN, DOWN, GELU), (False, True)):
        arguments = {"x": meta(ROWS, channels, dtype=BF16), "hadamard": through}
        variants = {"quantize_rows_kernel": variant_of(channels)}
        detail = f"{channels} channels{', Hadamard' if through else ''}"
        products = "bf16" if through else "none"
        yield Case("quantize_rows", arch, variants, products, detail, arguments)


def qkv_products(arch: int) -> Iterator[Case]:
    """`qkv_linear`: inputs and outputs in every format."""
    outs = [out for out in ATTENTION if arch >= FP8_SINCE or not uses_e4m3(out)]
    features = (HEADS_Q + 2 * HEADS_KV + 1) * HEAD_DIM
    for fmt, out, experts in itertools.product(formats(arch), outs, EXPERTS):
        arguments = {
            "x": meta(ROWS, HIDDEN, dtype=DTYPES[fmt]),
            "x_scale": None if fmt == "bf16" else meta(ROWS),
            "weight": meta(experts, features, HIDDEN, dtype=DTYPES[fmt]),
            "weight_scale": None if fmt == "bf16" else meta(experts, features),
            "qk_norm": meta(experts, 2, HEAD_DIM),
            "cos_sin": meta(ROWS, HEAD_DIM),
            "row_tiles": meta(BLOCKS[0], 3, dtype=I32),
            "num_heads_q": HEADS_Q,
            "num_heads_kv": HEADS_KV,
            "out": out,
            "qk_scale": meta(experts, 2) if out == "fp8" else None,
        }
        variant, form = f"qkv_{fmt}", f"{fmt}, {out} out"
        for pointers in loads("qkv", variant, arch):
            yield Case("qkv_linear", arch, {"qkv_linear_kernel": variant}, fmt, form, arguments, pointers)
        if arch == HOPPER_ARCH:
            variants = {"qkv_linear_beside_kernel": variant}
            yield Case("qkv_linear", arch, variants, fmt, form, arguments, hopper=True)


def attentions(arch: int) -> Iterator[Case]:
    """`block_sparse_attention`: formats, forms of the softmax, head dims, both ways to load; bf16 also with a flag.

    In the plain kernel and in the Hopper kernel, with what the model asks for, and with all. A case with a flag
    launches both forms, beside the Hopper kernel's the plain one.
    """
    kernel = "block_sparse_attention_kernel"
    for hopper, fmt, d, bounded in itertools.product((False, True), ATTENTION, HEAD_DIMS, (False, True)):
        plain = f"{fmt}_d{d}"
        variant = f"{plain}{FORM}" if hopper else plain
        # e4m3 P has a running maximum, that of bf16 in the Hopper kernel none.
        fp8_v = uses_e4m3(fmt)
        forms = (not fp8_v,) if hopper or fp8_v else (False, True)
        if bounded not in forms or str(arch) not in table("attention").get(variant, {}):
            continue
        ways, to_fp8 = loads("attention", plain, arch), arch >= FP8_SINCE
        if hopper:
            ways, to_fp8 = (False,), fmt != "bf16"
        wishes = [(1, False, False, False), (1, to_fp8, True, False)]
        if d == HEAD_DIM:
            wishes.append((HEADS_KV, to_fp8, False, False))
        if fmt == "bf16" and bounded:
            wishes += [(1, False, lse, True) for lse in ((False,) if hopper else (False, True))]
        for pointers, (map_heads, fp8_out, lse, flag) in itertools.product(ways, wishes):
            arguments = attention_arguments(fmt, d, map_heads, fp8_out, lse, bounded)
            # Where a table has descriptors, a bounded softmax and e4m3 v with an LSE still read through pointers.
            strided = pointers or (True in ways and lse and (bounded or fp8_v))
            variants = {kernel: f"{plain}_strided" if strided else plain}
            if hopper:
                variants = {"block_sparse_attention_hopper_kernel": variant}
            form = f"{fmt}, D {d}, {'fp8' if fp8_out else 'bf16'} out{', LSE' if lse else ''}"
            form += f", {map_heads} maps" if map_heads > 1 else ""
            if flag:
                variants[kernel if hopper else f"{kernel} running"] = f"{plain}_strided" if pointers else plain
                arguments, form = arguments | {"flag": meta(1, dtype=I32)}, f"{form}, flag"
            yield Case("block_sparse_attention", arch, variants, fmt, form, arguments, pointers, hopper)


def qkv_results(fmt: str, rows: int, d: int) -> dict[str, torch.Tensor | None]:
    """What `qkv_linear` gives attention and `select_blocks`, by its names: q, k, v, their scales, and the gate."""
    given: Any = SimpleNamespace(num_heads_q=HEADS_Q, num_heads_kv=HEADS_KV, out=fmt, cos_sin=meta(rows, d))
    return {name: x if x.numel() else None for name, x in zip(RESULTS, empty_qkv(given), strict=True)}


def attention_arguments(fmt: str, d: int, map_heads: int, fp8_out: bool, lse: bool, bounded: bool) -> dict[str, Any]:
    """Arguments of `block_sparse_attention`: dense tensors as `qkv_linear` gives them."""
    blocks = BLOCKS[0]
    listed = map_heads * blocks * blocks
    return {
        **qkv_results(fmt, ROWS, d),
        "counts": meta(map_heads, blocks, 2, dtype=I32),
        "starts": meta(map_heads, blocks, dtype=I32),
        "columns": meta(listed, dtype=I32),
        "mask_ids": meta(listed, dtype=I32),
        "mask_bits": meta(4, 128, 4, dtype=I32),
        "order": meta(map_heads * blocks, dtype=I32),
        "scale": d**-0.5,
        "bounded": bounded,
        "flag": None,
        "out_scale": meta(1) if fp8_out else None,
        "return_lse": lse,
    }


def linears(arch: int) -> Iterator[Case]:
    """`fp8_linear` and its epilogues: every entry of the table, both outputs of an activation, both ways to load.

    In int8 all have an x_scale per row, in e4m3 up; there the others have one, and proj's shape both.
    """
    for variant, known in table("linear").items():
        fmt, epilogue = variant.split("_")
        if str(arch) not in known:
            continue
        activation = epilogue in ("swiglu7", "gelu7")
        of_bf16 = ("bf16",) if fmt == "int8" or arch < FP8_SINCE else ("bf16", "fp8")
        outs = of_bf16 if activation else ("float32" if epilogue == "residual" else "bf16",)
        products = [(*shape, activation or fmt == "int8") for shape in SHAPES.get(epilogue, ((HIDDEN, HIDDEN),))]
        if fmt == "fp8" and not activation:
            products.append((HIDDEN, HIDDEN, True))
        for (features, inputs, per_row), experts, out, pointers in itertools.product(
            products, EXPERTS, outs, loads("linear", variant, arch)
        ):
            arguments = {
                "x": meta(ROWS, inputs, dtype=DTYPES[fmt]),
                "x_scale": None if fmt == "bf16" else meta(ROWS if per_row else 1),
                "weight": meta(experts, features, inputs, dtype=DTYPES[fmt]),
                "weight_scale": None if fmt == "bf16" else meta(experts, features),
                "row_tiles": meta(BLOCKS[0], 3, dtype=I32),
            }
            op, scales = "fp8_linear", " per row" if per_row and fmt == "fp8" and not activation else ""
            if activation:
                op, arguments = "fp8_linear_activation", arguments | {"activation": epilogue, "fp8": out == "fp8"}
            elif epilogue == "residual":
                op, arguments = "fp8_linear_residual", arguments | {"hidden": meta(ROWS, features)}
            detail = f"{fmt}{scales}, {epilogue}, {out} out{f', K {inputs}' if inputs != HIDDEN else ''}"
            yield Case(op, arch, {"fp8_linear_kernel": variant}, fmt, detail, arguments, pointers)
            if epilogue != "plain" and (arch, pointers) == (HOPPER_ARCH, False):
                variants = {f"{op}_beside_kernel": variant}
                yield Case(op, arch, variants, fmt, detail, arguments, hopper=True)


def selections(arch: int) -> Iterator[Case]:
    """`select_blocks`: its three kernels, for both lengths of clip and both ways to choose and to pool."""
    pairs = ((0, round(0.9 * 2**20)), (125, 0))
    # 90 % of the softmax, or a quarter of the blocks.
    for fmt, blocks, (keep, mass), mean in itertools.product(formats(arch), BLOCKS, pairs, (False, True)):
        of_qkv = qkv_results("int8_qk" if fmt == "int8" else fmt, blocks * 128, HEAD_DIM)
        arguments = {
            **{name: of_qkv[name] for name in ("q", "k", "q_scale", "k_scale")},
            "table": meta(blocks, blocks, dtype=I32),
            "prefix": meta(blocks, dtype=torch.int8),
            "live": meta(blocks * 128, dtype=torch.int8),
            "inverse": meta(blocks),
            "keep": keep,
            "mass": mass,
            "mean": mean,
        }
        variants = {
            "pool_blocks_kernel": f"pool_{fmt}",
            "select_blocks_kernel": "select",
            "order_rows_kernel": "order",
        }
        detail = f"{fmt}, {blocks} blocks, by {'number' if keep else 'mass'}, {'mean' if mean else 'max'}"
        yield Case("select_blocks", arch, variants, "none", detail, arguments)
