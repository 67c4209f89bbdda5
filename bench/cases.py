"""Shapes as data, shared by tests, microbenchmarks and tuning: every op of the fast model at the sizes it meets there.

A case is one op of one layer on one clip, in one precision. It knows what it costs: *useful* FLOPs are the model's own
(:mod:`happyhorse_fast.costs`), *computed* ones include padding and the masked part of partial blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from happyhorse_fast.block_map import BLOCK, BlockMap
from happyhorse_fast.config import PATCH, ModelConfig
from happyhorse_fast.costs import layer_kind, step_costs
from happyhorse_fast.eager.model import Layer
from happyhorse_fast.eager.sequence import Clip, dense_ranges, local_ranges
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.layer import empty_layer
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.fast.plan import LayerPlan
from happyhorse_fast.ops.runtime.formats import qk_format
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens, tokens_for

FULL = ModelConfig.preset("happyhorse-1.0-15b")
# The full model's kinds of layer and head grouping at a size that plain torch on one core runs in milliseconds.
SMALL = ModelConfig.preset("tiny").replace(
    num_layers=2,
    hidden_size=640,
    head_dim=128,
    mm_layers=(0,),
    gelu7_layers=(0,),
    local_attn_layers=(1,),
    frame_receptive_field=1,
)
# For Triton's interpreter, which takes 10 s for a layer of 1,750 tokens: half the heads' width, a third of the tokens.
TINY = SMALL.replace(hidden_size=128, head_dim=64, num_heads_q=2)
BLOCK_SPARSE, DROP_IN = "block_sparse_attention", "attention"
"""Attention as a layer calls it, which knows how large scores can be, and as any model's tensors are given to it."""
MASKS = ("window", "dense", "25%", "12.5%")
"""Block maps of attention; shares are of video pairs, chosen as :class:`happyhorse_fast.FastConfig`'s TopK does."""


@dataclass(frozen=True)
class Size:
    """A clip and the model that runs it.

    Attributes:
        name: Such as ``"1080p-5s"``.
        config: The model.
        clip: Latent size and audio tokens.
        text: Text tokens.
    """

    name: str
    config: ModelConfig
    clip: ClipTokens
    text: int = TEXT_TOKENS

    @property
    def grid(self) -> Clip:
        """Token grid of the clip."""
        clip = self.clip
        return Clip(clip.T // PATCH[0], clip.H // PATCH[1], clip.W // PATCH[2], clip.audio, self.text)

    @property
    def windowed(self) -> bool:
        """True where some layer has its frame window on this clip."""
        return any(self.config.is_local(i, self.clip.frame_tokens) for i in self.config.local_attn_layers)


TINY_SIZE = Size("tiny", TINY, ClipTokens(3, 16, 32, 13), 40)
SMALL_SIZE = Size("small", SMALL, ClipTokens(8, 32, 32, 33), 100)
FULL_SIZES = tuple(
    Size(f"{r}-{s}s", FULL, tokens_for(r, "16:9", s)) for s in (5, 10, 15) for r in ("1080p", "540p", "256p")
)


@functools.lru_cache
def padded_rows(size: Size) -> PaddedRows:
    """The padded sequence of a clip."""
    return PaddedRows.of(size.grid, windowed=size.windowed)


def token_ranges(size: Size, window: bool) -> list[tuple[int, int, int, int]]:
    """(q_start, q_end, k_start, k_end) of a layer without sparsity, in tokens."""
    return local_ranges(size.grid, size.config.frame_receptive_field) if window else dense_ranges(size.grid)


@functools.lru_cache(maxsize=16)  # all sizes: 16 MB at most each, 0.5 s to make
def exact_map(size: Size, window: bool) -> BlockMap:
    """The block map of a layer without sparsity, on the CPU."""
    rows = padded_rows(size)
    return BlockMap.from_ranges(*rows.to_rows(token_ranges(size, window)), rows.slots, rows.slots)


@dataclass(frozen=True)
class Case:
    """One op of one layer on one clip.

    Attributes:
        op: Name of the function in ``happyhorse_fast.ops``.
        part: Which of several uses of it: ``"proj"``, ``"down"``, an activation, or one of :data:`MASKS`; else "".
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"``; of attention one of `quantize.ATTENTION`, and of what
            chooses its blocks.
        size: Clip and model.
        layer: Layer of the model whose weights' shapes it takes.
    """

    op: str
    part: str
    precision: str
    size: Size
    layer: int

    @property
    def name(self) -> str:
        """Such as ``"block_sparse_attention-window/1080p-5s/fp8"``; the key of its results."""
        return f"{self.use}/{self.size.name}/{self.precision}"

    @property
    def use(self) -> str:
        """The op and which use of it, such as ``"block_sparse_attention-window"``."""
        return f"{self.op}{'-' if self.part else ''}{self.part}"

    @property
    def kind(self) -> str:
        """Its name at any size, such as ``"block_sparse_attention-window/fp8"``."""
        return f"{self.use}/{self.precision}"

    @property
    def variant(self) -> str:
        """Format by :data:`happyhorse_fast.ops.runtime.formats.VARIANTS`' name; int8 products lead to int8 q and k."""
        return "int8_x_int8_qk" if (self.op, self.precision) == ("qkv_linear", "int8") else self.precision

    @property
    def rows(self) -> int:
        """Rows of the padded sequence."""
        return padded_rows(self.size).slots

    @property
    def plan(self) -> LayerPlan:
        """Experts, heads and precision of the layer."""
        of_products = self.precision if self.precision in ("int8", "fp8") else "bf16"
        fast = FastConfig(precision=of_products)  # type: ignore[arg-type]
        return LayerPlan.of(self.size.config, fast, self.layer, {})

    def weight_shape(self, name: str) -> tuple[int, int, int]:
        """[E, F, K] of a packed weight: ``"qkv"``, ``"proj"``, ``"up"`` or ``"down"``."""
        published = Layer(self.size.config, self.layer, torch.bfloat16, torch.device("meta")).state_dict()
        experts, features, inputs = empty_layer(published, self.plan).weight_of(name).shape
        return experts, features, inputs

    @property
    def product(self) -> str | None:
        """The layer's weight that the op multiplies by, None where it has none."""
        return {"fp8_linear_activation": "up", "fp8_linear_residual": self.part, "qkv_linear": "qkv"}.get(self.op)

    @property
    def keep(self) -> int | None:
        """Video blocks that a sparse row keeps, None where the map is exact; as ``SparsePolicy`` counts them."""
        if self.part not in ("25%", "12.5%"):
            return None
        return max(1, round(float(self.part.removesuffix("%")) / 100 * self.video_blocks))

    @property
    def video_blocks(self) -> int:
        """Blocks of 128 rows that hold video."""
        return -(-padded_rows(self.size).starts[1] // BLOCK)

    def useful_flops(self) -> float:
        """FLOPs of the model's own tokens, features and pairs; 0 for norms and row codes."""
        if self.op == "select_blocks":
            return self.computed_flops()
        of = self.product or ("attention" if self.op in (BLOCK_SPARSE, DROP_IN) else None)
        share, size = {"dense": 1.0, "25%": 0.25, "12.5%": 0.125}.get(self.part), self.size
        costs = step_costs(size.config, size.clip, text=size.text, video_share=share)
        kind = layer_kind(size.config, self.layer, size.clip)
        return next((cost.flops for cost in costs if (cost.op, cost.kind) == (of, kind)), 0.0)

    def computed_flops(self) -> float:
        """FLOPs that the kernel really does: padded rows and features, whole blocks of attention."""
        config = self.size.config
        if self.op == "select_blocks":
            return 2.0 * config.num_heads_q * config.head_dim * (self.rows // BLOCK) ** 2
        if self.op in (BLOCK_SPARSE, DROP_IN):
            return 4.0 * config.num_heads_q * config.head_dim * BLOCK**2 * self.blocks()
        if self.product is None:
            return 0.0
        _, features, inputs = self.weight_shape(self.product)
        return 2.0 * self.rows * features * inputs

    def blocks(self) -> int:
        """Blocks of 128 x 128 that one query head of an attention case computes."""
        if self.keep is None:
            return sum(exact_map(self.size, self.part == "window").blocks())
        every, video = self.rows // BLOCK, self.video_blocks
        return video * (min(self.keep, video) + every - video) + (every - video) * every


def cases_of(size: Size) -> Iterator[Case]:
    """Every op at one size, all precisions, those that a step spends most time in first."""
    config = size.config
    shared = next(i for i in range(config.num_layers) if i not in (*config.mm_layers, *config.gelu7_layers))
    sandwich = config.gelu7_layers[0]
    for precision in ("fp8", "int8_qk_fp8_v", "int8_qk", "bf16"):
        for mask in MASKS:
            if mask == "window" and not size.windowed:
                continue
            local = next((i for i in config.local_attn_layers if i >= shared), shared)
            yield Case(BLOCK_SPARSE, mask, precision, size, local if mask == "window" else shared)
        if qk_format(precision) == precision:
            yield Case("select_blocks", "25%", precision, size, shared)
    yield Case(DROP_IN, "dense", "bf16", size, shared)
    for precision in ("fp8", "int8", "bf16"):
        yield Case("fp8_linear_activation", "swiglu7", precision, size, shared)
        yield Case("fp8_linear_residual", "down", precision, size, shared)
        yield Case("qkv_linear", "", precision, size, shared)
        yield Case("fp8_linear_residual", "proj", precision, size, shared)
        yield Case("rmsnorm_quantize", "", precision, size, shared)
        yield Case("fp8_linear_activation", "gelu7", precision, size, sandwich)
    for part in ("down", "proj"):
        yield Case("quantize_rows", part, "int8", size, shared)


def cases(scope: str) -> list[Case]:
    """All cases of a scope.

    Args:
        scope: ``"tiny"`` for the interpreter, ``"small"`` for plain torch on a CPU, ``"main"`` for the full model at
            1080p and 5 s, ``"rest"`` for it at every other size, or ``"full"`` for both.

    Raises:
        ValueError: No such scope.
    """
    sizes = {
        "tiny": (TINY_SIZE,),
        "small": (SMALL_SIZE,),
        "main": FULL_SIZES[:1],
        "rest": FULL_SIZES[1:],
        "full": FULL_SIZES,
    }
    if scope not in sizes:
        raise ValueError(f"scope must be one of {', '.join(sizes)}; got {scope!r}")
    of_sizes = [list(cases_of(size)) for size in sizes[scope]]
    # A kind of case at every size before the next kind: a run that is cut has the ops that most time goes to.
    kinds = [case.kind for case in max(of_sizes, key=len)]
    return sorted((case for found in of_sizes for case in found), key=lambda case: kinds.index(case.kind))


def select(found: list[Case], words: str) -> list[Case]:
    """The cases whose name holds any of the comma-separated words; all where there are none.

    Raises:
        ValueError: A word is in no name, most likely a typing error.
    """
    wanted = [word for word in words.split(",") if word]
    for word in wanted:
        if not any(word in case.name for case in found):
            raise ValueError(f"case must be part of a name such as {found[0].name}; got {word!r}")
    return [case for case in found if not wanted or any(word in case.name for word in wanted)]
