"""What ranks send each other, on paper: bytes of the exchange around attention, and the time they take on a link."""

from __future__ import annotations

from dataclasses import dataclass

from happyhorse_fast.arguments import require_choice
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import ATTENTION_BYTES
from happyhorse_fast.tokens import ClipTokens

# Bytes of the float32 scales per query row and head; scales of a head's tile.
_SCALES = {"bf16": (0, 0), "int8_qk": (4, 1), "int8_qk_fp8_v": (4, 2), "fp8": (0, 1)}
_GATE_BYTES = 4
_TILE = 128


@dataclass(frozen=True)
class Link:
    """A connection of every GPU to all others.

    Attributes:
        name: Of the connection.
        bandwidth: GB/s that a GPU sends while it receives as much.
        source: Where that is stated.
    """

    name: str
    bandwidth: float
    source: str


LINKS = (
    Link("NVLink 4", 450, "NVIDIA H100 datasheet, SXM: 900 GB/s, both directions together"),
    Link("PCIe 5 x16", 63, "PCI Express 5.0: 32 GT/s on 16 lanes, 128b/130b"),
)


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in one layer, bytes; it receives as much.

    Attributes:
        first: Before attention can start: keys, values, their scales, and the first head's queries.
        later: While a key/value head is attended to: the other queries, and all outputs but the last head's.
        last: The last head's output.
        groups: Key/value heads of a rank, which attention takes one after another.
    """

    first: float
    later: float
    last: float
    groups: int

    @property
    def bytes(self) -> float:
        """All of them."""
        return self.first + self.later + self.last

    def seconds(self, link: Link, attention: float) -> tuple[float, float]:
        """(on the link, of it not beside attention's ``attention`` seconds)."""
        first, later, last = (part / (link.bandwidth * 1e9) for part in (self.first, self.later, self.last))
        hidden = min(later, attention * (self.groups - 1) / self.groups)
        return first + later + last, first + later + last - hidden


def layer_exchange(
    config: ModelConfig, clip: ClipTokens, ranks: int, *, text: int, precision: str, attention: str
) -> Exchange:
    """The exchange of one layer of an accelerated model, dummy and padding rows left out.

    A rank sends (P - 1) / P of its N / P rows: to every other rank its heads.

    Args:
        config: The model.
        clip: Latent size and audio tokens.
        ranks: P.
        text: Text tokens.
        precision: Of the products; in ``"fp8"`` attention's output is e4m3.
        attention: One of `quantize.ATTENTION`.

    Raises:
        ValueError: An attention there is not.
    """
    require_choice("attention", attention, ATTENTION_BYTES)
    (of_qk, of_v), (of_scale, of_tile) = ATTENTION_BYTES[attention], _SCALES[attention]
    q, kv, d = config.num_heads_q, config.num_heads_kv, config.head_dim
    rows = clip.total(text) / ranks * (ranks - 1) / ranks
    tiles = of_tile * kv * 4 / _TILE
    keys = rows * (kv * d * (of_qk + of_v) + tiles)
    queries = rows * q * (d * of_qk + _GATE_BYTES + of_scale)
    outputs = rows * q * d * (1 if precision == "fp8" else 2)
    groups = max(1, kv // ranks)
    others = (queries + outputs) * (groups - 1) / groups
    return Exchange(keys + queries / groups, others, outputs / groups, groups)
