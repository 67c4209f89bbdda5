"""What is known when the Hopper attention kernel is compiled: sizes, and layouts of tensors in registers."""

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from happyhorse_fast.kernels.block_sparse_attention import P_EXPONENT

GROUPS = gl.constexpr(2)
"""Warp groups that compute."""


@dataclass(frozen=True)
class Sizes:
    """Compile-time constants of one kernel; bits are of an element of q and k, and of v."""

    heads_q: int
    heads_kv: int
    map_heads: int
    d: int
    block: int
    stages: int
    q_bits: int
    v_bits: int

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
    def pv_fp8(self) -> bool:
        """Whether P and v are e4m3."""
        return self.v_bits == 8

    @property
    def bias(self) -> Any:
        """P is multiplied by 2 to this power."""
        return P_EXPONENT if self.pv_fp8 else 0.0

    @property
    def s_layout(self) -> Any:
        """Of S: four warps below each other; one instruction is 32 bytes deep."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.block, 256 // self.q_bits])

    @property
    def o_layout(self) -> Any:
        """Of the accumulator."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.d, 256 // self.v_bits])

    @property
    def p_layout(self) -> Any:
        """Of P as PV's operand."""
        return gl.DotOperandLayout(0, self.o_layout, 32 // self.v_bits)

    @property
    def s_row(self) -> Any:
        """Of one number per row of S."""
        return gl.SliceLayout(1, self.s_layout)

    @property
    def o_row(self) -> Any:
        """Of one number per row of the accumulator."""
        return gl.SliceLayout(1, self.o_layout)


@gluon.constexpr_function
def sizes_of(heads_q, heads_kv, map_heads, d, block, stages, q_bits, v_bits):
    """The sizes as one compile-time value."""
    return Sizes(heads_q, heads_kv, map_heads, d, block, stages, q_bits, v_bits)
