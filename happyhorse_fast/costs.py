"""What a denoising step costs on paper: FLOPs, compulsory bytes, and the time below which no kernel can go.

Pure arithmetic on a :class:`ModelConfig` and a clip, no torch. A floor is the larger of FLOPs over peak rate and bytes
over bandwidth, per operation, where every weight and activation moves once: norms carry the residual add of the branch
before them, and epilogues write what the next product reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from happyhorse_fast.arguments import require_choice
from happyhorse_fast.config import MODALITIES, PATCH, ModelConfig
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens

OUTSIDE = "outside layers"
"""``kind`` of the embedders and output heads, which are in no layer."""
CARDS = (24, 48, 80)
"""Memory that cards are sold with, GB; what a clip is said to fit."""
CONTEXT_BYTES = 2**29
"""Of a card's memory, for the CUDA context and libraries' workspaces, which no plan counts: 0.3 to 0.5 GiB."""
# Bytes of an element: of attention q and k, and v; inputs of a product per precision, output of a branch (bf16),
# residual stream (float32).
ATTENTION_BYTES = {"bf16": (2, 2), "int8_qk": (1, 2), "int8_qk_fp8_v": (1, 1), "fp8": (1, 1)}
_INPUT_BYTES: dict[str, int] = {"bf16": 2, "int8": 1, "fp8": 1}
# Formats of QK and of PV, where they are two.
_MIXED = {"int8_qk": ("int8", "bf16"), "int8_qk_fp8_v": ("int8", "fp8")}
_BRANCH_BYTES = 2
_STREAM_BYTES = 4


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one card, dense (no structured sparsity), with float32 accumulation, as its maker states them.

    Attributes:
        name: What ``happyhorse-fast plan --gpu`` takes.
        bf16: Tensor-core TFLOP/s.
        int8: Tensor-core TOP/s.
        fp8: Tensor-core TFLOP/s, None where the card has no fp8.
        fp32: TFLOP/s outside the tensor cores.
        bandwidth: Memory, TB/s.
        memory: GB that the card is sold with.
        source: Where the numbers are stated.
    """

    name: str
    bf16: float
    int8: float
    fp8: float | None
    fp32: float
    bandwidth: float
    memory: int
    source: str

    def rate(self, precision: str) -> float:
        """Peak FLOP/s in ``"bf16"``, ``"int8"``, ``"fp8"`` or ``"fp32"``; of attention's formats: a product of each.

        Raises:
            ValueError: The card has no tensor cores for it.
        """
        rates = {"bf16": self.bf16, "int8": self.int8, "fp8": self.fp8, "fp32": self.fp32}
        peak = rate_of(precision, rates)
        if peak is None:
            raise ValueError(f"precision must be one that the gpu has: {self.name} has no {precision} tensor cores")
        return peak * 1e12


def rate_of(precision: str, rates: Mapping[str, float | None]) -> float | None:
    """The rate in a format of ``rates``, or of attention, with as much work in QK's as in PV's; None without one."""
    of_qk, of_pv = (rates[fmt] for fmt in _MIXED.get(precision, (precision, precision)))
    return 2 / (1 / of_qk + 1 / of_pv) if of_qk and of_pv else None


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989, 1979, 1979, 67, 3.35, 80, "NVIDIA H100 datasheet, SXM"),
        Gpu("h200", 989, 1979, 1979, 67, 4.8, 141, "NVIDIA H200 datasheet, SXM"),
        Gpu("a100", 312, 624, None, 19.5, 2.04, 80, "NVIDIA A100 datasheet, SXM 80 GB"),
        Gpu("rtx4090", 165.2, 660.6, 330.3, 82.6, 1.008, 24, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        Gpu("rtx5090", 209.5, 838, 419, 104.8, 1.792, 32, "NVIDIA RTX Blackwell architecture whitepaper, appendix A"),
    )
}


def usable_bytes(gb: int) -> float:
    """Bytes that tensors may take of a card of ``gb`` GB, :data:`CONTEXT_BYTES` left free.

    A GB is 10^9 bytes, the least that a card of the name has (an L4 of 24 GB shows 22.5 GiB).
    """
    return gb * 1e9 - CONTEXT_BYTES


def cards_for(peak_bytes: float) -> list[int]:
    """List which of :data:`CARDS` tensors fit that peak at so many bytes."""
    return [gb for gb in CARDS if peak_bytes <= usable_bytes(gb)]


def gpu_named(name: str) -> Gpu:
    """A card by name.

    Raises:
        ValueError: No such card; the message lists those there are.
    """
    require_choice("gpu", name, GPUS)
    return GPUS[name]


# Attention ------------------------------------------------------------------------------------------------------------


def window_share(frames: int, receptive_field: int) -> float:
    """Share of video-to-video pairs that a window of ``receptive_field`` frames to either side keeps; 1 where dense."""
    kept = sum(min(f + receptive_field + 1, frames) - max(f - receptive_field, 0) for f in range(frames))
    return kept / frames**2


def attention_pairs(clip: ClipTokens, text: int, video_share: float = 1.0) -> float:
    """Query-key pairs of one head: ``video_share`` of the video pairs, and all pairs with audio or text in them."""
    total = clip.total(text)
    return total**2 - clip.video**2 * (1 - video_share)


# Operations -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpCost:
    """One operation of one kind of layer.

    Attributes:
        op: norms, qkv, attention, proj, up, down; outside the layers embed and heads.
        kind: Kind of layer, such as ``"sandwich gelu7 window"``, or ``"outside layers"``.
        count: How often it runs in a step.
        flops: Of its products, each time; 0 for norms.
        bytes: That it must read and write, each time.
        floor_ms: Least time for it, each time.
    """

    op: str
    kind: str
    count: int
    flops: float
    bytes: float
    floor_ms: float


def layer_kind(config: ModelConfig, layer: int, clip: ClipTokens) -> str:
    """Name of a layer's kind: sandwich or shared, its MLP, window or dense attention, post-norm where it has one."""
    return " ".join(
        [
            "sandwich" if config.experts(layer) > 1 else "shared",
            "gelu7" if layer in config.gelu7_layers else "swiglu7",
            "window" if config.is_local(layer, clip.frame_tokens) else "dense",
            *(["post-norm"] if layer in config.post_norm_layers else []),
        ]
    )


def step_costs(
    config: ModelConfig,
    clip: ClipTokens,
    *,
    text: int = TEXT_TOKENS,
    precision: str = "bf16",
    attention: str | None = None,
    gpu: Gpu = GPUS["h100"],
    video_share: float | None = None,
    gpus: int = 1,
) -> list[OpCost]:
    """Cost of one forward pass per operation and kind of layer; of one of ``gpus`` that share the sequence.

    Args:
        config: The model.
        clip: Latent size.
        text: Text tokens.
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"``: of products and attention (int8: ``"int8_qk"``) inside layers.
            Embedders and heads are float32 in all; the scales that 8 bits add (below 4 % of such an activation's bytes)
            are left out.
        attention: Precision of attention where it is another than the products'.
        gpu: Card whose peaks make the floor.
        video_share: Share of video pairs that every layer computes, in place of dense and window; None for the exact
            masks.
        gpus: Ranks that share the sequence: each has all weights, its rows, and in attention its heads.

    Raises:
        ValueError: ``text``, ``precision`` or ``video_share`` is out of range, or the card lacks the precision.
    """
    if text < 1:
        raise ValueError(f"text must be at least 1 token, got {text}")
    if attention is None:
        attention = "int8_qk" if precision == "int8" else precision
    require_choice("precision", precision, _INPUT_BYTES)
    require_choice("attention", attention, ATTENTION_BYTES)
    if video_share is not None and not 0 <= video_share <= 1:
        raise ValueError(f"video_share must be from 0 to 1, got {video_share}")
    kinds = Counter(layer_kind(config, layer, clip) for layer in range(config.num_layers))
    example = {layer_kind(config, layer, clip): layer for layer in range(config.num_layers)}
    window = window_share(clip.T // PATCH[0], config.frame_receptive_field)
    costs = []
    for kind, count in kinds.items():
        exact = window if config.is_local(example[kind], clip.frame_tokens) else 1.0
        pairs = attention_pairs(clip, text, exact if video_share is None else video_share)
        ops = _layer(config, example[kind], clip.total(text) / gpus, pairs / gpus, (precision, attention))
        rates = {op: attention if op == "attention" else precision for op in ops}
        costs += [_op(op, kind, count, *ops[op], rates[op], gpu) for op in ops]
    ops = _outside(config, clip, text, gpus)
    return costs + [_op(op, OUTSIDE, 1, *ops[op], "fp32", gpu) for op in ops]


def _op(op: str, kind: str, count: int, flops: float, moved: float, precision: str, gpu: Gpu) -> OpCost:
    seconds = max(flops / gpu.rate(precision), moved / (gpu.bandwidth * 1e12))
    return OpCost(op, kind, count, flops, moved, 1e3 * seconds)


def _layer(
    config: ModelConfig, layer: int, n: float, pairs: float, precision: tuple[str, str]
) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes by op, of n tokens and a head's pairs of them; ``precision`` of products and of attention."""
    element, (of_qk, of_v) = _INPUT_BYTES[precision[0]], ATTENTION_BYTES[precision[1]]
    width, wide = config.hidden_size, config.intermediate_size(layer)
    q, kv = config.num_heads_q * config.head_dim, config.num_heads_kv * config.head_dim

    def product(rows: int, columns: int, moved: float) -> tuple[float, float]:
        return 2.0 * n * rows * columns, config.experts(layer) * rows * columns * element + moved

    packed = n * ((q + kv) * of_qk + kv * of_v + config.num_heads_q * _BRANCH_BYTES)  # q, k, v and the gate
    # A norm reads the stream and the branch before it, writes the stream and what the next product reads.
    norm = n * width * (2 * _STREAM_BYTES + _BRANCH_BYTES + element)
    # In int8 attention and up write bf16, and a pass of its own makes codes of it.
    written = _BRANCH_BYTES if precision[0] == "int8" else element
    ops = {
        "norms": (0.0, 2.0 * norm),
        "qkv": product(config.qkv_features, width, n * width * element + packed),
        "attention": (4.0 * q * pairs, packed + n * q * written),
        "proj": product(width, q, n * (q * element + width * _BRANCH_BYTES)),
        "up": product(config.up_features(layer), width, n * (width * element + wide * written)),
        "down": product(width, wide, n * (wide * element + width * _BRANCH_BYTES)),
    }
    if precision[0] == "int8":
        ops["quantize"] = (0.0, n * (q + wide) * (_BRANCH_BYTES + element))
    return ops


def _outside(config: ModelConfig, clip: ClipTokens, text: int, gpus: int) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes by op."""
    width = config.hidden_size
    channels = {m: getattr(config, f"{m}_in_channels") for m in MODALITIES}
    tokens = dict(zip(MODALITIES, (n / gpus for n in (clip.video, clip.audio, text)), strict=True))

    def product(modalities: tuple[str, ...]) -> tuple[float, float]:
        moved = 4.0 * sum(tokens[m] * (channels[m] + width) + channels[m] * width for m in modalities)
        return sum(2.0 * tokens[m] * channels[m] * width for m in modalities), moved

    return {"embed": product(MODALITIES), "heads": product(MODALITIES[:2])}


def totals(costs: list[OpCost]) -> dict[str, float]:
    """Add up a step.

    Returns:
        ``linear_flops`` of the products with weights inside layers, ``attention_flops``, ``flops`` of all products,
        embedders and heads included; ``bytes``: compulsory traffic; ``floor_ms_per_step``: sum of the floors.
    """
    attention = sum(c.count * c.flops for c in costs if c.op == "attention")
    linear = sum(c.count * c.flops for c in costs if c.kind != OUTSIDE and c.op != "attention")
    return {
        "linear_flops": linear,
        "attention_flops": attention,
        "flops": linear + attention + sum(c.count * c.flops for c in costs if c.kind == OUTSIDE),
        "bytes": sum(c.count * c.bytes for c in costs),
        "floor_ms_per_step": sum(c.count * c.floor_ms for c in costs),
    }
