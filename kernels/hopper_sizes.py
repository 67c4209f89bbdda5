"""Compile-time constants of the Hopper attention kernel: sizes, and layouts of tensors in registers.

Triton's cache knows a kernel by its arguments and its functions' source, not by the source of these properties. After a
change of one of them alone it gives the kernel of before, and `bench.aot` reads old code: clear it.
"""

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GROUPS = gl.constexpr(2)
"""Warp groups that compute."""


@dataclass(frozen=True)
class Sizes:
    """Compile-time constants of one kernel. ``q_bits`` are of an element of q and of k, ``v_bits`` of v."""

    heads_q: int
    heads_kv: int
    map_heads: int
    d: int
    block: int
    stages: int
    q_bits: int
    v_bits: int
    lse: bool

    @property
    def k_stages(self) -> int:
        """Slots of k: one more than of v where a slot of queries leaves room for it, in bf16 with heads of 128."""
        return self.stages + 2 - self.q_slots

    @property
    def v_later(self) -> int:
        """Steps that v's slots are free later than k's: PV is a step later, and the ring shorter."""
        return 1 + self.k_stages - self.stages

    @property
    def q_slots(self) -> int:
        """Slots of queries: with two the next item's arrive while this item is computed."""
        return 1 if self.q_bits == 16 and self.d == 128 else 2

    @property
    def rows(self) -> Any:
        """Queries of a block that one group computes."""
        return self.block // GROUPS

    @property
    def shared(self) -> int:
        """Query heads that walk the same row of the map."""
        return self.heads_q // self.map_heads

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads_q // self.heads_kv

    @property
    def e4m3(self) -> bool:
        """Whether q, k, P and v are e4m3."""
        return self.v_bits == 8

    @property
    def int8(self) -> bool:
        """Whether q and k are int8, with scales; P and v are bf16."""
        return self.q_bits == 8 and self.v_bits == 16

    @property
    def turns(self) -> bool:
        """Whether the groups take turns at PV: in e4m3 they did not help."""
        return not self.e4m3

    @property
    def s_type(self) -> Any:
        """Element type of S, the scores."""
        return gl.int32 if self.int8 else gl.float32

    @property
    def s_layout(self) -> Any:
        """Layout of S: the four warps split its rows; one instruction reduces over 32 bytes of channels."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.block, 256 // self.q_bits])

    @property
    def o_layout(self) -> Any:
        """Layout of the accumulator."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.d, 256 // self.v_bits])

    @property
    def p_layout(self) -> Any:
        """Layout of P as PV's left operand, in registers."""
        return gl.DotOperandLayout(0, self.o_layout, 32 // self.v_bits)

    @property
    def s_row(self) -> Any:
        """Layout of a vector with one number per row of S."""
        return gl.SliceLayout(1, self.s_layout)

    @property
    def o_row(self) -> Any:
        """Layout of a vector with one number per row of the accumulator."""
        return gl.SliceLayout(1, self.o_layout)


@gluon.constexpr_function
def sizes_of(*values):
    """Make one compile-time value of the sizes."""
    return Sizes(*values)
