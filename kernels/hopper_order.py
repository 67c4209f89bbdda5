"""What keeps ptxas from moving instructions in the Hopper attention kernel (CUDA 12.8 to 13.0); Gluon: for Hopper.

It moves arithmetic over branches, barriers and products, up to where its operands are there, and down to its use. A
softmax would begin between the end of PV and the next QK, and its sums would end there, some 80 instructions of delay a
step. It moves no shuffle over a branch, and so nothing that needs its result, or that it needs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def hold_order(rings):
    """Branch, at a wait that ends at once, since it is for the phase before an mbarrier's first.

    Without it a softmax behind a QK stands among its products, of which the last ones then delay PV.
    """
    mbarrier.wait(rings.open.index(0), 1)


@gluon.jit
def pinned(x):
    """Return x by a shuffle of each thread with itself: what x needs stays before it, and what needs x behind it.

    ptxas sees through it where all threads hold the same number.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=f,f", [x], gl.float32, False, 1
    )
