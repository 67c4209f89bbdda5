"""What both kernels of QKV's product share: constants of its heads, scales and results of a launch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SOURCE = gl.constexpr(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
"""Of this file: as of `hopper_sizes`, for Triton's cache, which does not know the source of a property."""


@dataclass(frozen=True)
class Heads:
    """Compile-time constants of QKV: heads of q, of k and of v, their channels ``d``, and formats.

    ``codes``: of 8 bits are the operands. q and k are int8 with ``int8_qk``, else e4m3 with ``fp8_v``, else bf16.
    """

    q: int
    kv: int
    d: int
    codes: bool
    int8_qk: bool
    fp8_v: bool

    @property
    def rotated(self) -> int:
        """Heads of q and k."""
        return self.q + self.kv

    @property
    def gates(self) -> int:
        """The first head of gates."""
        return self.q + 2 * self.kv

    @property
    def all(self) -> int:
        """Heads, those of gates included."""
        return self.gates - (-self.q // self.d)


@gluon.constexpr_function
def heads_of(*values):
    """Make one compile-time value of the heads' constants."""
    _ = SOURCE  # which makes it a part of the kernel's key
    return Heads(*values)


class Scales(NamedTuple):
    """Scales of a launch: of x's rows, of the weight's channels, of norms [E, 2, D], and static ones of q and k."""

    x: Any
    weight: Any
    norm: Any
    qk: Any


class Results(NamedTuple):
    """Where the results go. ``blocks`` are those of 128 rows."""

    q: Any
    k: Any
    v: Any
    q_scale: Any
    k_scale: Any
    v_scale: Any
    gate: Any
    blocks: Any
