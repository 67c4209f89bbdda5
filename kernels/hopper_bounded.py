"""Bounded softmax of one block, for bf16 and for int8 q and k: a part of the Hopper kernel.

A bound on the scores keeps exp2(score) in float32's range (`ops.attention.score_bound`), so p = exp2(s * scale) needs
no maximum to find, to share between threads or to correct for. Each of the four threads of a row keeps its own row sum
until the item ends. P is summed after it is rounded to bf16: its largest value in a row is not 1, and a row of one key
must give exactly that key's v.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def packed(p, sizes: gl.constexpr):
    """Round P to bf16, two columns to a 32-bit word: ptxas would carry 64 values of 16 bits in 64 registers."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def operand(words, sizes: gl.constexpr):
    """Return packed P as PV's left operand. Both columns of a word pass it to the assembly, which uses one."""
    both = gl.reshape(gl.join(words, words), (sizes.rows, sizes.block))
    halves = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r", [gl.convert_layout(both, sizes.p_layout)], gl.int16, True, 2
    )
    return halves.to(gl.bfloat16, bitcast=True)


@gluon.jit
def sums(even, odd, sizes: gl.constexpr):
    """Return each thread's sum over its own columns, [rows, 4]."""
    return gl.sum(gl.reshape(even + odd, (sizes.rows, sizes.block // 8, 4)), axis=1)


@gluon.jit
def sums_rounded(words, sizes: gl.constexpr):
    """Return each thread's sum of packed P. A bf16 is the upper half of its float32."""
    even, odd = (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)
    return sums(even, odd, sizes)


@gluon.jit
def sums_unrounded(p, sizes: gl.constexpr):
    """Return each thread's sum of P before rounding, [rows, 4], for an LSE."""
    even, odd = gl.split(gl.reshape(p, (sizes.rows, sizes.block // 2, 2)))
    return sums(even, odd, sizes)


@gluon.jit
def no_sums_bounded(sizes: gl.constexpr):
    """Return sums of nothing, [rows, 4], in the layout of :func:`sums`."""
    return sums_unrounded(gl.full([sizes.rows, sizes.block], 0.0, gl.float32, layout=sizes.s_layout), sizes)


@gluon.jit
def exponents(s, scores, k_scale, sizes: gl.constexpr):
    """Return the scores as exponents of 2. Masks come after this: a scale may round to 0, and -inf * 0 is NaN."""
    if sizes.int8:
        t = s.to(gl.float32) * (scores * k_scale)[:, None]
    else:
        t = s * scores[:, None]
    return t


@gluon.jit
def softmax_bounded(running, t, sizes: gl.constexpr):
    """Return (P, packed, its sums after rounding and before, for an LSE), both added to the running ones."""
    p = gl.exp2(t)
    log_sum = running.other
    if sizes.lse:
        log_sum = log_sum + sums_unrounded(p, sizes)
    words = packed(p, sizes)
    return words, running.row_sum + sums_rounded(words, sizes), log_sum


@gluon.jit
def start_pv_bounded(words, acc, v_ring, stage, sizes: gl.constexpr):
    """Issue PV of packed P onto the accumulator."""
    return warpgroup_mma(operand(words, sizes), v_ring.tiles.index(stage), acc, is_async=True)
