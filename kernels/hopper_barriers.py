"""Named barriers (PTX `bar`) between the warps of the Hopper attention kernel; Gluon itself offers mbarriers alone.

Such a barrier completes when the stated number of threads has arrived at it. A warp that syncs waits for that, one that
arrives does not. There are 16 of them. Triton may take the first four for itself, and turns take 6 and
7; `bench.aot.gates` checks both in the compiled code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TURNS = gl.constexpr(6)
"""Number of the named barrier of group 0's turn; the next number is group 1's."""


@gluon.constexpr_function
def bar(kind, threads):
    """Return the assembly of the instruction. Triton's inline assembly must have a result; nobody reads this one."""
    return f"bar.{kind} $1, {threads}; mov.b32 $0, $1;"


@gluon.jit
def sync_at(number, THREADS: gl.constexpr):
    """Arrive at a barrier, and wait until THREADS threads have."""
    asm: gl.constexpr = bar("sync", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def arrive_at(number, THREADS: gl.constexpr):
    """Arrive at a barrier of THREADS threads, and go on."""
    asm: gl.constexpr = bar("arrive", THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def await_turn(GROUP: gl.constexpr):
    """Wait until the other group has issued its products."""
    sync_at(TURNS + GROUP, 256)


@gluon.jit
def pass_turn(GROUP: gl.constexpr):
    """Let the other group issue its products."""
    arrive_at(TURNS + 1 - GROUP, 256)
