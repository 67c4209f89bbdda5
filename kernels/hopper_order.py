"""Hold ptxas to the order of the Hopper attention kernel where time depends on it.

ptxas (CUDA 12.8) moves arithmetic up into the products that a group issues, and down behind the wait for them. A loop
stops it, but not a loop without effect, which it drops. So both functions contain a loop that ends at once, with a
NANOSLEEP in it that never runs: an ISETP and a branch. Even so ptxas may compute a value before the loop or after it,
where the loop does not need it. Hence a zero that is known only behind the loop, and sums that the loop itself reads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def zero_behind(number):
    """Return 0, for a ``number`` that is not negative; ptxas computes what needs it behind this point."""
    asm: gl.constexpr = (
        "{.reg .pred ends; again: setp.ge.s32 ends, $1, 0; @ends bra on; nanosleep.u32 32; bra again; "
        "on: vote.sync.ballot.b32 $0, !ends, 0xffffffff;}"
    )
    return gl.inline_asm_elementwise(asm, "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def computed_here(sums):
    """Return sums of P, two a thread; ptxas computes them before this point. None is negative; NaN passes."""
    asm: gl.constexpr = (
        "{.reg .pred ends; .reg .f32 least; min.f32 least, $2, $3; again: setp.geu.f32 ends, least, 0f00000000; "
        "@ends bra on; nanosleep.u32 32; bra again; on: mov.b32 $0, $2; mov.b32 $1, $3;}"
    )
    return gl.inline_asm_elementwise(asm, "=f,=f,f,f", [sums], gl.float32, False, 2)
