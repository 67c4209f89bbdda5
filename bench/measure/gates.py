"""The correctness gate in front of every number: the very call that is timed, against float64, per 128 x 128 tile.

Whole outputs of the full model would take petaflops in float64, so some blocks of 128 rows are compared: all of them
up to 1,024 rows, beyond that the first, the last and six drawn ones. Every other block must at least have been written:
outputs are poisoned with NaN before the call.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.cases import BLOCK_SPARSE, DROP_IN, Case
from bench.hopper import HOPPER
from bench.inputs import Given, call
from happyhorse_fast import budgets
from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.block_map.bits import unpack
from happyhorse_fast.checkpoint.stream import is_finite
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.linear.contract import ACTIVATIONS
from happyhorse_fast.ops.qkv.contract import RESULTS
from happyhorse_fast.ops.qkv.reference import epilogue
from happyhorse_fast.ops.quantize import dequantize, hadamard, to_e4m3, token_order
from happyhorse_fast.ops.runtime.formats import uses_e4m3

# An e4m3 output is 3.5e-4 from the exact value by its own rounding, whatever its scale (docs/OPS.md, number formats); a
# scale that is 4 % off is 8e-4 away.
E4M3_DISTANCE = 5e-4
# A row's largest value over 127 and the square root of 12 is 0.6 to 1 % of its RMS where that value is 3 to 4.5 times
# it: 3.5e-5 to 1e-4 of distance; a scale that is 4 % off is 8e-4 away.
INT8_DISTANCE = 2e-4
# P in e4m3 (1e-3 allowed) and an e4m3 output on top of it; a scale 4 % off fails by its slope.
ATTENTION_FP8_DISTANCE = budgets.ATTENTION_DISTANCE_EXACT_P + E4M3_DISTANCE
# k has a scale per head and 128 tokens, whose largest value is 5 to 6 times the RMS: up to 2e-4.
INT8_K_DISTANCE = 4e-4
# Sums of int8 codes are exact: what is left is their float32 epilogue, 1e-7 of a value and 1e-14 of distance.
INT8_SUM_DISTANCE, INT8_SUM_SLOPE = 1e-12, 1e-6
# In the Hopper kernel they cross to its epilogue as float16: 2.1e-4 of a value and 2.2e-8 of distance, and a slope
# of 2e-6 from 16,384 independent roundings. Five and fifty times that.
FLOAT16_DISTANCE, FLOAT16_SLOPE = 1e-7, 1e-4
CODE_SLOPE = 5e-3
# How far a sum in e4m3 may move a result before it is rounded to a code. Tensor cores add with 13 fraction bits: at K
# 5120 a sum is off by 1.4e-3 of itself where it is large (tests/emulators/wgmma_accumulator.py), a product of two by
# 2e-3. Four times that.
SUM_ERROR = 2.0**-7
# Between codes on both sides, their rounding apart (`codes_beside`): at most 2.1e-5 of distance in simulation, and at
# least 2.9e-4 where a scale is 2 % off. One that is 1 % off fails by its ratios.
BESIDE_DISTANCE = 1e-4
# The mean of a tile's results over their codes, and their scatter (`code_ratios`): at most 8.4e-4 and 2.7e-4 there.
RATIO_DISTANCE, RATIO_SLOPE = 1e-3, 4e-3
ROUNDED = {
    "bf16": (budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE),
    "int8": (INT8_DISTANCE, CODE_SLOPE),
    "fp8": (E4M3_DISTANCE, CODE_SLOPE),
}
"""What a result may be off by in a format: distance and slope of a tile."""
ALL_BLOCKS_UP_TO = 8
DRAWN_BLOCKS = 6
# Dynamic choices between scores that differ by their rounding alone may fall either way.
SAME_BLOCKS = 0.99

Compared = tuple[str, Tensor, Tensor, float, float | None]
"""(name, result [rows, ...], exact, allowed tile distance, allowed tile slope or None)."""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every uninitialised tensor made inside with NaN, or an integer's maximum."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a property of the module's class, which no checker sees
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def problems(case: Case, given: Given, backend: str) -> list[str]:
    """Run a case once and say what is wrong with its result; empty where every budget holds."""
    written = {"hidden": given["hidden"].clone()} if "hidden" in given else {}  # by ops that write there
    with poisoned():
        results = call(case, given | written, backend)
    if case.op == "select_blocks":
        return _selection_problems(given, results)
    found = [
        f"result {i} has NaN or Inf: a tile that nothing wrote, or an overflow"
        for i, result in enumerate(results)
        if result.numel() and not is_finite(result)
    ]
    for block in _blocks(case.rows // BLOCK):
        for name, result, exact, distance, slope in _compare(case, given, results, block, backend):
            found += [
                f"{name}, rows {block * BLOCK}: {problem}"
                for problem in budgets.violations(budgets.measure(result, exact), distance=distance, slope=slope)
            ]
    return found


def _blocks(count: int) -> list[int]:
    if count <= ALL_BLOCKS_UP_TO:
        return list(range(count))
    return sorted({0, count - 1, *random.Random(count).sample(range(count), DRAWN_BLOCKS)})


def _rows(block: int) -> slice:
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _compare(case: Case, given: Given, results: tuple[Tensor, ...], block: int, backend: str) -> Iterator[Compared]:
    rows = _rows(block)
    if case.op in (BLOCK_SPARSE, DROP_IN):
        yield from _attention(case, given, results, block)
    elif case.op == "rmsnorm_quantize":
        weight = given["norm_weight"][_expert(given, block)]
        exact = rms_norm(given["hidden"][rows].double(), weight.double())
        x = results[0][rows]
        values = x if case.precision == "bf16" else dequantize(x, results[1][rows], torch.float64)
        yield "x", values, exact, *ROUNDED[case.precision]
    elif case.op == "quantize_rows":
        x = given["x"][rows].double()
        values = dequantize(results[0][rows], results[1][rows], torch.float64)
        yield "codes", values, hadamard(x) if given["hadamard"] else x, INT8_DISTANCE, CODE_SLOPE
    elif case.op == "qkv_linear":
        yield from _qkv(case, given, results, block)
    elif case.op == "fp8_linear_residual":
        added = results[0][rows].double() - given["hidden"][rows].double()
        distance, slope = budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE
        if case.precision == "int8":
            crossed = backend == HOPPER
            distance, slope = (FLOAT16_DISTANCE, FLOAT16_SLOPE) if crossed else (INT8_SUM_DISTANCE, INT8_SUM_SLOPE)
        yield "hidden", added, _product(given, block), distance, slope
    else:
        function = ACTIVATIONS[given["activation"]][0]
        exact = function(_product(given, block))
        if given["fp8"]:
            y = dequantize(results[0][rows], results[1], torch.float64)
            yield from compare_codes("y", y, exact, results[1])
        else:
            yield "y", results[0][rows], exact, budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE


def compare_codes(name: str, y: Tensor, exact: Tensor, scale: Tensor) -> Iterator[Compared]:
    """Compare values of e4m3 codes with exact ones whose sums an e4m3 product made."""
    yield name, y, codes_beside(y, exact, scale), BESIDE_DISTANCE, None
    ratios = code_ratios(y, exact, scale)
    yield f"{name} over its codes", ratios, torch.ones_like(ratios), RATIO_DISTANCE, RATIO_SLOPE


def codes_beside(y: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """Round exact values to e4m3 codes of a scale; float64. Beside a boundary between two codes both are right.

    A sum's error moves a value past a boundary that is near. So where an exact value lies within SUM_ERROR of one, the
    result's own code is taken.
    """
    low, high = (
        dequantize(to_e4m3(exact * (1 + error) / scale.double()), scale, torch.float64)
        for error in (-SUM_ERROR, SUM_ERROR)
    )
    return y.clamp(torch.minimum(low, high), torch.maximum(low, high))


def code_ratios(y: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """Divide results by what their exact values round to in e4m3; 1 where that is less than the least normal code.

    A tile's slope weighs values by their squares, and a few large ones make up most of a tile of SwiGLU7: one that a
    sum's error moves to the next code changes it by up to 8e-3. The mean of ratios weighs all values alike. In
    simulation on Hopper's accumulator it is 8.4e-4 from 1 at most in 30,000 tiles, and at least 8.7e-3 where a scale is
    1 % off. Each ratio counts at most a quarter, two codes.
    """
    codes = dequantize(to_e4m3(exact / scale.double()), scale, torch.float64)
    least = torch.finfo(torch.float8_e4m3fn).smallest_normal  # below it codes are an eighth of a value apart, or more
    normal = codes.abs() >= scale.double() * least
    return torch.where(normal, y / codes, 1.0).clamp(0.75, 1.25)


def _expert(given: Mapping[str, Any], block: int) -> int:
    return int(given["row_tiles"][block, 0])


def _product(given: Given, block: int) -> Tensor:
    """x . weight of one block's expert in float64, [rows, F]: of 27,392 x 5120 the weight is 1.1 GB then."""
    expert, rows = _expert(given, block), _rows(block)
    x, x_scale, weight = given["x"][rows], given["x_scale"], given["weight"][expert]
    if x_scale is None:
        return x.double() @ weight.double().T
    x = dequantize(x, x_scale if len(x_scale) == 1 else x_scale[rows], torch.float64)
    return x @ dequantize(weight, given["weight_scale"][expert], torch.float64).T


def _qkv(case: Case, given: Given, results: tuple[Tensor, ...], block: int) -> Iterator[Compared]:
    expert, rows = _expert(given, block), _rows(block)
    qk_norm, cos_sin = given["qk_norm"][expert].double(), given["cos_sin"][rows].double()
    heads = case.plan.num_heads_q, case.plan.num_heads_kv
    q, k, v, gate = epilogue(_product(given, block), qk_norm, cos_sin, *heads)
    exact = {"v": v, "gate": gate, "q": q, "k": k}
    out = dict(zip(RESULTS, results, strict=True))
    scales, budget = {}, dict.fromkeys(exact, ROUNDED["bf16"])
    if case.precision == "int8":
        scales = {"q": out["q_scale"][rows, :, None], "k": out["k_scale"][:, block, None]}
        budget |= {"q": ROUNDED["int8"], "k": (INT8_K_DISTANCE, CODE_SLOPE)}
    elif case.precision == "fp8":
        scales = {"q": out["q_scale"][block], "k": out["k_scale"][block], "v": out["v_scale"][:, block, None]}
        budget |= dict.fromkeys("qkv", ROUNDED["fp8"])
        out["v"] = token_order(out["v"]).permute(2, 0, 1)
    for name, value in exact.items():
        result = out[name][rows]
        yield name, result.double() * scales[name].double() if name in scales else result, value, *budget[name]


def _attention(case: Case, given: Given, results: tuple[Tensor, ...], block: int) -> Iterator[Compared]:
    """One group of query heads, drawn with the block; all keys. Codes are what they stand for."""
    rows = _rows(block)
    heads_kv, group = case.plan.num_heads_kv, case.plan.num_heads_q // case.plan.num_heads_kv
    head = block % heads_kv
    heads = slice(head * group, (head + 1) * group)
    block_map: BlockMap = given["block_map"]
    mask = row_mask(block_map, head % block_map.heads, block)
    q, k, v = given["q"][rows, heads].double(), given["k"][:, head].double(), given["v"]
    fp8_v = uses_e4m3(case.precision)
    if case.precision == "fp8":
        q = q * given["q_scale"][block].double()
        k = k * given["k_scale"].double().repeat_interleave(BLOCK)[: len(k), None]
    if fp8_v:
        v = (token_order(v[head]).double() * given["v_scale"][head].double().repeat_interleave(BLOCK)).T[: len(k)]
    else:
        v = v[:, head].double()
    if given["q"].dtype == torch.int8:
        q = q * given["q_scale"][rows, heads, None].double()
        k = k * given["k_scale"][head].double().repeat_interleave(BLOCK)[: len(k), None]
    scores = (torch.einsum("qgd,kd->qgk", q, k) * given["scale"]).masked_fill(~mask[:, None], -torch.inf)
    exact = scores.softmax(dim=-1) @ v
    if "gate" in given:
        exact = exact * given["gate"][rows, heads].double()[..., None]
    out = results[0][rows, heads]
    if fp8_v:
        values = dequantize(out, results[1], torch.float64)
        yield f"out, head {head}", values, exact, ATTENTION_FP8_DISTANCE, CODE_SLOPE
    else:
        yield f"out, head {head}", out, exact, budgets.GEMM_DISTANCE, budgets.GEMM_SLOPE


def row_mask(block_map: BlockMap, head: int, row: int) -> Tensor:
    """bool [128, keys]: what one block of queries sees."""
    start, (full, every) = int(block_map.starts[head, row]), block_map.counts[head, row].tolist()
    columns = block_map.columns[start : start + every].long()
    mask = torch.zeros(block_map.key_blocks, BLOCK, BLOCK, dtype=torch.bool, device=block_map.device)
    mask[columns[:full]] = True
    ids = block_map.mask_ids[start + full : start + every].long()
    mask[columns[full:]] = unpack(block_map.mask_bits[ids])
    return mask.permute(1, 0, 2).flatten(1)[:, : block_map.keys]


def _selection_problems(given: Given, results: tuple[Tensor, ...]) -> list[str]:
    wanted = select_blocks(**given, backend="reference")
    counts, starts, columns, mask_ids, order = results
    found = BlockMap(counts, starts, columns, mask_ids, wanted.mask_bits, order, wanted.queries, wanted.keys)
    try:
        found.validate()
    except ValueError as error:
        return [f"map: {error}"]
    if not torch.equal(counts[..., 1], wanted.counts[..., 1]):
        return ["map: rows keep another number of blocks than the reference's"]
    (ours, our_ids), (theirs, their_ids) = found.to_blocks(), wanted.to_blocks()
    ours, theirs = ours | (our_ids >= 0), theirs | (their_ids >= 0)
    share = int((ours & theirs).sum()) / int(theirs.sum())
    least = f"at least {SAME_BLOCKS:.0%}"
    return [] if share >= SAME_BLOCKS else [f"map: {share:.2%} of the reference's blocks, {least}"]
