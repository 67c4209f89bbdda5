"""Compile-time constants of the Hopper attention kernel: sizes, and layouts of tensors in registers."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GROUPS = gl.constexpr(2)
"""Warp groups that compute."""
SOURCE = gl.constexpr(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
"""Of this file. Triton's cache knows a kernel by the source of its functions and the values of constants, not by the
source of a property: without this a change of one would give the kernel of before."""


@dataclass(frozen=True)
class Sizes:
    """Compile-time constants of one kernel. ``q_bits`` are of an element of q and of k, ``v_bits`` of v.

    ``int8``: q and k are int8, with a scale per row of q and one per head and block of k.
    """

    heads_q: int
    heads_kv: int
    map_heads: int
    d: int
    block: int
    stages: int
    q_bits: int
    v_bits: int
    int8: bool
    lse: bool

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
        """Whether P and v are e4m3."""
        return self.v_bits == 8

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
    _ = SOURCE  # which makes it a part of the kernel's key
    return Sizes(*values)
