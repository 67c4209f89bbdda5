"""Bugs to plant in the Hopper attention kernel: format -> bug -> (what stands there once, what is put in its place)."""

SCALED = "    t = scaled(s, scales, running"
HIDE = "    if MASKED:\n        t = hide(t, work, at, GROUP * sizes.rows, sizes)\n"
HIDE_FIRST = "    if MASKED:\n        s = hide(s.to(gl.float32), work, at, GROUP * sizes.rows, sizes)\n"
MASKED_FIRST = ((HIDE, ""), (SCALED, HIDE_FIRST + SCALED))

PLANTED = {
    "queries not awaited": ("slot = await_full(rings.q, turn, Q_SLOTS)", "slot = turn % Q_SLOTS"),
    "queries never released": ("        release(rings.q, slot)\n", ""),
    "wrong parity, full": ("use // SLOTS & 1)\n", "(use // SLOTS & 1) ^ 1)\n"),
    "wrong parity, empty": ("(step // SLOTS & 1) ^ 1)", "step // SLOTS & 1)"),
    "bytes of one tile": ("TILES * source.block_type.nbytes", "source.block_type.nbytes"),
    "no fence": ("    fence_async_shared()\n", ""),
    "step forgotten": ("            use += n_all\n", "            use += n_all - 1\n"),
    "other slot": ("rings.q.tiles.index(slot * GROUPS + GROUP)", "rings.q.tiles.index(slot * GROUPS)"),
    "other mask word": ("column // 32 == word", "column // 64 == word"),
    "other half's mask": ("(first + row) * WORDS", "row * WORDS"),
    "rows past the end": ("mask=(query < queries)[:, None])", "mask=None)"),
    "one reader": ("steps = make_barriers(STAGES, GROUPS)", "steps = make_barriers(STAGES, 1)"),
    "three readers": ("steps = make_barriers(STAGES, GROUPS)", "steps = make_barriers(STAGES, 3)"),
    "other key/value head": ("channel = head // sizes.group * sizes.d", "channel = head % sizes.group * sizes.d"),
}  # fmt: skip
STEP = "    s = warpgroup_mma_wait(1, deps=[s_pending])\n"
TURN = "    pass_turn(GROUP)\n" + STEP
AWAIT_K = "    stage = await_full(rings.k, use, sizes.stages)\n"
AWAIT_V = "    before = await_full(rings.v, use - 1, sizes.stages)\n"
AWAIT_LAST_V = "    before = await_full(rings.v, use + item.n_all - 1, sizes.stages)\n"


BEGIN_NOBODY = ("    if GROUP == 1:\n        pass_turn(GROUP)\n", "")
BEGIN_BOTH = ("    if GROUP == 1:\n        pass_turn", "    if GROUP < 2:\n        pass_turn")

AWAIT_BOTH = AWAIT_K + AWAIT_V + "    await_turn"
RELEASE = "    release(rings.k, stage)\n"
ISSUE_QK = "    s_pending = start_qk(item.q_tile, rings.k, stage, sizes)\n    pv_pending = warpgroup"
WAIT_PV = "    acc = warpgroup_mma_wait(0, deps=[pv_pending])\n"
SUMS = (
    ("running.row_sum + sums(even, odd, sizes)", "running.row_sum + sums_unrounded(p, sizes)"),
    ("packed(even, odd), sums(even, odd, sizes)", "packed(even, odd), sums_unrounded(p, sizes)"),
)
IN_TURNS = {
    "k not awaited": (AWAIT_BOTH, AWAIT_BOTH.replace(AWAIT_K, "    stage = use % sizes.stages\n")),
    "v not awaited": (AWAIT_BOTH, AWAIT_BOTH.replace(AWAIT_V, "    before = (use - 1) % sizes.stages\n")),
    "last v not awaited": (
        AWAIT_LAST_V + "    v = rings",
        "    before = (use + item.n_all - 1) % sizes.stages\n    v = rings",
    ),
    "v's slot filled a step early": ("v, key, channel, 1, sizes.stages, 1)", "v, key, channel, 1, sizes.stages)"),
    "never released": (WAIT_PV + RELEASE, WAIT_PV),
    "first block never released": (RELEASE + "    t = scaled(", "    t = scaled("),
    "released early": (WAIT_PV + RELEASE, RELEASE + WAIT_PV),
    "result before its wait": (TURN, TURN.replace("(1,", "(2,")),
    "turn not passed": (TURN, STEP),
    "turn passed twice": (TURN, "    pass_turn(GROUP)\n" + TURN),
    "turn passed too early": (ISSUE_QK, "    pass_turn(GROUP)\n" + ISSUE_QK),
    "turn passed between": ("    pv_pending = warp", "    pass_turn(GROUP)\n    pv_pending = warp"),
    "turn not awaited": (AWAIT_V + "    await_turn(GROUP)\n", AWAIT_V),
    "nobody begins": BEGIN_NOBODY,
    "both begin": BEGIN_BOTH,
    "halves of a word": ("packed(even, odd), row_sum", "packed(odd, even), row_sum"),
    "upper halves twice": ("(words << 16)", "(words & -65536)"),
    "sum of the last block alone": ("running.row_sum + sums(even", "sums(even"),
    "a turn of other size": ("    arrive_at(TURNS + 1 - GROUP, 256)", "    arrive_at(TURNS + 1 - GROUP, 288)"),
    "the same turn for both": ("    arrive_at(TURNS + 1 - GROUP, 256)", "    arrive_at(TURNS + GROUP, 256)"),
}  # fmt: skip
INT8 = {
    "k's scale of the next block": ("scaled(s, scales, running.k_scale", "scaled(s, scales, next_scale"),
    "column of another block": ("column_of(work, gl.minimum(at + 2", "column_of(work, gl.minimum(at + 1"),
    "scales of another head": ("of_k += kv_head * key_blocks", "of_k += 0"),
    "q's scale of another head": ("sizes.heads_q + head, mask=live, other=1.0", "sizes.heads_q, mask=live, other=1.0"),
}  # fmt: skip
NEXT_QK = "    s_pending = start_qk(item.q_tile, rings.k, stage, sizes)\n    pass_turn(GROUP)\n"
FIRST_QK = "    s = warpgroup_mma_wait(0, deps=[start_qk(item.q_tile, rings.k, stage, sizes)])\n"
AFTER_FIRST = "    await_turn(GROUP)\n    full = gl.minimum"
OWN_V = "    own = await_full(rings.v, use, sizes.stages)\n"
PV = "    await_turn(GROUP)\n    pv_pending = start_pv(p, s, rings, own, sizes)\n"
ENDED = "    pv, next_s = warpgroup_mma_wait(0, deps=[pv_pending, s_pending])\n"
ADDED = "    acc = add_pv(running, pv, alpha, sizes)\n"
KEPT = "Running(acc, row_sum, row_max, next_k, next_v, next_column), next_s"
LAST_TURN = "    pv_pending = start_pv(p, s, rings, own, sizes)\n    pass_turn(GROUP)\n"
THIS_V = "                    fill_v(rings, use - 1, v, key, channel, sizes)\n"
FILL_V = "fill(rings.v, use, v, channel, key, 1, sizes.stages, 1)"
LAST_V = "        if sizes.e4m3 and steps > 0:\n"
E4M3 = {
    "k not awaited": ("stage = await_full(rings.k, use + 1, sizes.stages)", "stage = (use + 1) % sizes.stages"),
    "first k not awaited": (
        AWAIT_K + FIRST_QK + RELEASE + AFTER_FIRST,
        "    stage = use % sizes.stages\n" + FIRST_QK + RELEASE + AFTER_FIRST,
    ),
    "k of this block again": ("await_full(rings.k, use + 1,", "await_full(rings.k, use,"),
    "v not awaited": (OWN_V, "    own = use % sizes.stages\n"),
    "v of the next block": (OWN_V, OWN_V.replace("use,", "use + 1,")),
    "v of the block before the last": (
        "own = await_full(rings.v, use + item.n_all - 1,",
        "own = await_full(rings.v, use + item.n_all - 2,",
    ),
    "v of another block loaded": (THIS_V, THIS_V.replace("key", "after")),
    "v's slot filled a step early": (FILL_V, FILL_V.replace("stages, 1)", "stages)")),
    "last v never loaded": (LAST_V, LAST_V.replace("steps > 0", "steps < 0")),
    "v loaded behind k of the next item": (LAST_V, LAST_V.replace("steps > 0", "steps > 1")),
    "never released": (ADDED + RELEASE, ADDED),
    "first block never released": (RELEASE + AFTER_FIRST, AFTER_FIRST),
    "first block released before its scores are there": (
        FIRST_QK + RELEASE + AFTER_FIRST,
        RELEASE + FIRST_QK + AFTER_FIRST,
    ),
    "released before the scores are there": (NEXT_QK, NEXT_QK + RELEASE),
    "released before PV has ended": (ENDED + ADDED + RELEASE, RELEASE + ENDED + ADDED),
    "released twice": (ADDED + RELEASE, ADDED + RELEASE + RELEASE),
    "result before its wait": (ENDED, ENDED.replace("(0,", "(1,")),
    "scores of this block again": (KEPT, KEPT.replace("next_s", "s")),
    "sums of the step before": (KEPT, KEPT.replace("row_sum", "running.row_sum")),
    "accumulator of the step before": (KEPT, KEPT.replace("acc", "running.acc")),
    "the last of an odd number of steps left out": ("if full % 2 == 1:", "if full < 0:"),
    "a pair too many": ("range(full // 2)", "range((full + 1) // 2)"),
    "all blocks again as partial ones": ("range(full, item.n_all - 1)", "range(0, item.n_all - 1)"),
    "no mask in the last block": ("if item.n_full < item.n_all:", "if item.n_full < 0:"),
    "mask of the next block": ("        s = hide(s, work, at,", "        s = hide(s, work, at + 1,"),
    "an order that the compiler may undo": ("[x], gl.float32, False, 1", "[x], gl.float32, True, 1"),
    "turn not passed": (NEXT_QK, NEXT_QK.replace("    pass_turn(GROUP)\n", "")),
    "turn passed twice": (NEXT_QK, NEXT_QK + "    pass_turn(GROUP)\n"),
    "turn not awaited": (OWN_V + PV, OWN_V + PV.replace("    await_turn(GROUP)\n", "")),
    "first turn not awaited": (AFTER_FIRST, AFTER_FIRST.replace("    await_turn(GROUP)\n", "")),
    "turn passed before QK": (NEXT_QK, "    pass_turn(GROUP)\n" + NEXT_QK.replace("    pass_turn(GROUP)\n", "")),
    "last turn not passed": (LAST_TURN, LAST_TURN.replace("    pass_turn(GROUP)\n", "")),
    "last turn passed before PV": (
        LAST_TURN,
        "    pass_turn(GROUP)\n" + LAST_TURN.replace("    pass_turn(GROUP)\n", ""),
    ),
    "nobody begins": BEGIN_NOBODY,
    "both begin": BEGIN_BOTH,
    "column of another block": ("work.columns + gl.minimum(at + 2", "work.columns + gl.minimum(at + 1"),
    "no guard of empty rows": ('row_max == -float("inf"), 0.0', "row_max == 1.0, 0.0"),
    "sum not rescaled": ("running.row_sum * per_thread(alpha, running.row_sum) +", "running.row_sum +"),
    "accumulator not rescaled": ("running.acc * gl.convert_layout(alpha, sizes.o_row)[:, None]", "running.acc"),
    "accumulator left out": (ADDED + RELEASE, "    acc = pv\n" + RELEASE),
    "k's scale of the step before": (KEPT, KEPT.replace("next_k", "running.k_scale")),
    "v's scale of the step before": (KEPT, KEPT.replace("next_v", "running.v_scale")),
    "v's scale not in P": ("(shift - P_EXPONENT - log_v)", "(shift - P_EXPONENT)"),
    "v's scale not in the maximum": ("largest + log_v)", "largest)"),
    "v's scale left in the sum": ("sums(p, sizes) * per_v", "sums(p, sizes)"),
    "tokens in their own order": ("(0, 1, 3, 2, 4)", "(0, 1, 2, 3, 4)"),
    "scales of another head": ("of_v += kv_head * key_blocks", "of_v += 0"),
}
INT8_AND_E4M3 = {
    "k's scales of another head": INT8["scales of another head"],
    "q's scale of another head": INT8["q's scale of another head"],
}
BUGS = {
    "bf16": PLANTED | IN_TURNS,
    "int8_qk": PLANTED | IN_TURNS | INT8,
    "int8_qk_fp8_v": PLANTED | E4M3 | INT8_AND_E4M3,
    "fp8": PLANTED | E4M3,
}


HIDDEN_BY_SCALE = {
    "hidden scores in the maximum": ("most == HIDDEN", "most < HIDDEN"),
    "exponents of hidden scores by their scale": ("t = gl.where(s == HIDDEN", "t = gl.where(s < HIDDEN"),
}
"""With int8 q and k and e4m3 v, where a scale may be 0."""
MAXIMUM_AGAIN = "    row_max = gl.maximum(row_max, gl.max(s, axis=1) * scales.scores * running.k_scale - 100.0)\n"
WIDE_E4M3 = {
    "PV over scores that are still used": (OWN_V + PV, OWN_V + PV + MAXIMUM_AGAIN),
    "PV over the next block's scores": (OWN_V + PV, OWN_V + PV.replace("p, s, rings", "p, s_pending, rings")),
    "PV added to scores": ("into, use_acc=False", "into, use_acc=True"),
}
"""With heads of 128 alone, where PV is written over scores."""
