"""Softmax of one block in e4m3, with a running maximum, and its PV: a part of the Hopper kernel.

P needs the maximum: without it P would spread over more powers of two than e4m3 has. v's scale of a block is folded
into P's exponent: P is 2^8 * 2^(s - m), where s is the score plus log2 of v's scale, and m is the largest s. So PV of a
block needs no multiplication by v's scale. It is still added to the accumulator in float32: the tensor cores' own sum
of e4m3 products keeps 13 fraction bits, and over the 502 blocks of a 1080p clip a channel whose mean is half its spread
loses a third (tests/emulators/test_wgmma_accumulator.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from happyhorse_fast.kernels.attention import P_EXPONENT

LEAST_V_SCALE = gl.constexpr(2.0**-96)
"""A smaller scale of v is raised to this. Sums of P are divided by the scale, and 2^(96 + 8) times 2^20 keys fits
float32. The result is off by less than 448 * 2^-96."""


@gluon.jit
def packed(p, sizes: gl.constexpr):
    """Pack P as e4m3, four columns to a 32-bit word, in v's fragment order (docs/OPS.md). No value changes threads."""
    by_token = gl.permute(gl.reshape(p, (sizes.rows, sizes.block // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    even, odd = gl.split(gl.reshape(by_token, (sizes.rows, sizes.block // 4, 2, 2)))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        "mov.b32 $0, {l, h};}",
        "=r,f,f,f,f",
        [a, b, c, d],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def operand(words, sizes: gl.constexpr):
    """Return packed P as PV's left operand. All four columns of a word pass it to the assembly, which uses one."""
    two = gl.join(words, words)
    four = gl.reshape(gl.join(two, two), (sizes.rows, sizes.block))
    codes = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [gl.convert_layout(four, sizes.p_layout)], gl.int8, True, 4
    )
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def per_thread(x, like):
    """Convert one number per row to the layout of ``like``, the sums of :func:`softmax`, [rows, 1]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def log2_and_reciprocal(x):
    """Return log2(x) and 1 / x of a normal float32 by one instruction each: `gl.log2` and a division take 20."""
    log = gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)
    return log, gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def at_least(v_scale):
    """Raise a block's scale of v to LEAST_V_SCALE where it is smaller; NaN stays."""
    return gl.where(v_scale < LEAST_V_SCALE, LEAST_V_SCALE, v_scale)


@gluon.jit
def sums(p, sizes: gl.constexpr):
    """Return each thread's sum over its own columns, [rows, 4]."""
    return gl.sum(gl.sum(gl.reshape(p, (sizes.rows, sizes.block // 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def no_sums_e4m3(sizes: gl.constexpr):
    """Return sums of nothing, [rows, 4], in the layout of :func:`sums`."""
    return sums(gl.full([sizes.rows, sizes.block], 0.0, gl.float32, layout=sizes.s_layout), sizes)


@gluon.jit
def softmax_e4m3(running, s, GUARDED: gl.constexpr, sizes: gl.constexpr):
    """Run one step of the online softmax in base 2: (P, packed, the accumulator's factor, row_sum, row_max)."""
    scale = running.scores * running.k_scale
    log_v, per_v = log2_and_reciprocal(at_least(running.v_scale))
    row_max = gl.maximum(running.other, gl.max(s, axis=1) * scale + log_v)
    shift = row_max
    if GUARDED:  # in a row without a key so far -inf - -inf would be NaN
        shift = gl.where(row_max == -float("inf"), 0.0, row_max)
    p = gl.exp2(s * scale - (shift - P_EXPONENT - log_v)[:, None])
    alpha = gl.exp2(running.other - shift)
    row_sum = running.row_sum * per_thread(alpha, running.row_sum) + sums(p, sizes) * per_v
    return packed(p, sizes), alpha, row_sum, row_max


@gluon.jit
def start_pv_e4m3(words, dead, v_ring, stage, sizes: gl.constexpr):
    """Issue PV of packed P into the registers of ``dead``, the block's scores, where there are as many of them.

    Scores of two blocks, the accumulator and PV would be 256 registers. Left to itself ptxas spills 352 bytes.
    """
    if sizes.d == sizes.block:
        into = dead
    else:
        into = gl.full([sizes.rows, sizes.d], 0.0, gl.float32, layout=sizes.o_layout)
    v = v_ring.tiles.index(stage).permute((1, 0))
    return warpgroup_mma(operand(words, sizes), v, into, use_acc=False, is_async=True)


@gluon.jit
def add_pv(running, pv, alpha, sizes: gl.constexpr):
    """Return the accumulator, rescaled to the new maximum, plus a finished PV."""
    return running.acc * gl.convert_layout(alpha, sizes.o_row)[:, None] + pv
