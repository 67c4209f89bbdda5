"""What the tests of the choice of blocks share: inputs, selectors, and maps compared in every tensor."""

from __future__ import annotations

import interpreter  # noqa: F401  (exact arithmetic)
import torch
from hypothesis import strategies as st
from strict import strict

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector, Layout
from happyhorse_fast.ops import select_blocks
from happyhorse_fast.ops.qkv.reference import quantize_k
from happyhorse_fast.ops.quantize import int8_rows

FP8 = torch.float8_e4m3fn
ALIGNED = Layout(3, 250, 30, 1, align_frames=True, align_modalities=True)  # 8 blocks, 6 of them video
RAGGED = Layout(5, 131, 20, 30)  # 705 slots, no boundary on a block
SCORES = ("bf16", "int8_qk", "fp8")
KERNELS = ("triton", "cuda")


def inputs(layout=ALIGNED, heads=(2, 1), d=32, fmt="bf16", seed=0, spread=1.0):
    """q, k and their scales as keyword arguments; random, so no two scores are close to each other."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(layout.slots, h, d, generator=generator) * spread for h in heads)
    if fmt == "bf16":
        return {"q": q.bfloat16(), "k": k.bfloat16()}
    if fmt == "int8_qk":
        q, q_scale = int8_rows(q)
        k, k_scale = quantize_k(k)
        # Of one distribution all scales are alike, and no test would see one of another row, head or block.
        q_scale, k_scale = (
            x.contiguous() * (0.5 + torch.rand(x.shape, generator=generator)) for x in (q_scale, k_scale)
        )
        return {"q": q, "k": k, "q_scale": q_scale, "k_scale": k_scale}
    scales = [0.5 + torch.rand(-(-layout.slots // BLOCK), generator=generator) for _ in range(2)]
    return {"q": (100 * q).to(FP8), "k": (100 * k).to(FP8), "q_scale": scales[0] / 100, "k_scale": scales[1] / 100}


def integers(layout, heads=(2, 1), d=32, seed=0, distinct=3):
    """q and k of small integers, with blocks alike and so with ties; their scores are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for h in heads:
        patterns = torch.randint(-2, 3, (distinct, BLOCK, h, d), generator=generator).float()
        patterns[0] *= 0
        which = torch.randint(0, distinct, (-(-layout.slots // BLOCK),), generator=generator)
        made.append(patterns[which].flatten(0, 1)[: layout.slots].bfloat16())
    return dict(zip("qk", made, strict=True))


def selector(layout=ALIGNED, radius=None):
    return BlockSelector(layout, BlockMap.frame_window(layout, radius), "cpu")


def differences(ours, theirs):
    """Names of the tensors of two maps that are not equal."""
    names = ("counts", "starts", "columns", "mask_ids", "mask_bits", "order")
    found = [n for n, a, b in zip(names, ours.tensors(), theirs.tensors(), strict=True) if not torch.equal(a, b)]
    blocks = zip(ours.to_blocks(), theirs.to_blocks(), strict=True)
    return found + ([] if all(torch.equal(a, b) for a, b in blocks) else ["blocks"])


def held(chooser, given, *, backend="triton", checked=False, **amount):
    """The kernels' map, validated and equal to plain torch's, every tensor and every place of it.

    With ``checked`` in the strict interpreter, which takes three times as long; for CUDA, with poisoned outputs.
    """
    if checked:
        with strict(seed=0):
            ours = select_blocks(**given, selector=chooser, backend=backend, **amount)
    else:
        ours = select_blocks(**given, selector=chooser, backend=backend, **amount)
    ours.validate()
    assert differences(ours, select_blocks(**given, selector=chooser, **amount, backend="reference")) == []
    return ours


def kept(block_map):
    full, ids = block_map.to_blocks()
    return full | (ids >= 0)


@st.composite
def cases(draw):
    """(layout, radius of its frame window, heads, seed, how much to keep)."""
    size = lambda top: draw(st.integers(0, top))  # noqa: E731
    layout = Layout(1 + size(3), 1 + size(200), size(150), size(150), draw(st.booleans()), draw(st.booleans()))
    amount = {"keep": 1 + size(6)} if draw(st.booleans()) else {"mass": draw(st.floats(0.01, 1.0))}
    heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    return layout, draw(st.sampled_from([None, 0, 1])), heads, draw(st.integers(0, 99)), amount
