"""Steps played through from listings made for it, whose cycles can be counted by hand, and from the kernel's own."""

from __future__ import annotations

import pytest

from bench.aot.__main__ import compiled
from bench.aot.playback import Instruction, Player, Rates, Roles

MEASURED = {"bf16": 2570, "int8_qk": 2310, "fp8": 2322}
"""Cycles of a step on an H200 at 3a38272 (docs/kernels/attention.md)."""
TILES = {"k": 1000, "v": 1000}
QK = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"
PV = "HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR8].tnspB, R88, gsb0"
INTEGERS = "IGMMA.64x128x32.S8.S8 R24, gdesc[UR12], RZ, !UPT, gsb0"
ENDED = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TRY, RELEASE = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR41+0x34030], R24", "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR41], RZ"
NO_TILES = Roles((), (), 1)
ROLES = Roles((("k", 0), ("v", -1)), (0,), 1)


def line(text, stall=1, sets=7, reads=7, waits=0):
    """An instruction as nvdisasm lists it with its encoding."""
    control = stall | sets << 5 | reads << 8 | waits << 11
    return f"        /*0010*/                   {text} ;  /* 0x{0:016x} */ /* 0x{control << 41:016x} */"


def body(*lines):
    return [Instruction.parsed(one) for one in lines]


def cycles(first, second=None, slots=2, roles=NO_TILES, **rates):
    return Player([first, second or first], slots, TILES, roles, Rates(**rates)).cycles()


def test_an_instruction_is_read_with_what_stands_in_its_encoding():
    one = Instruction.parsed(line("@!P0 MUFU.EX2 R28, R29.reuse", 8, 2, 1, 0b100001))
    assert (one.op, one.stall, one.sets, one.reads, one.waits) == ("MUFU.EX2", 8, 2, 1, (0, 5))
    with pytest.raises(ValueError, match="no encoded instruction: 'FADD'"):
        Instruction.parsed("FADD")


def test_stalls_and_the_one_instruction_a_cycle_that_two_warps_share():
    assert cycles(body(line("FADD R1, R2, R3", 5), line("FADD R1, R1, R3", 3))) == 8
    assert cycles(body(*[line("FADD R1, R2, R3")] * 20, line("FADD R1, R1, R3", 10))) == 2 * 21


def test_a_pipe_is_shared_too():
    rest = line("FADD R1, R1, R3", 15)  # in which the other warp has its part
    assert cycles(body(*[line("MUFU.EX2 R1, R1")] * 2, rest)) == 2 * 2 * 8
    assert cycles(body(*[line("LOP3.LUT R1, R1, R2, RZ")] * 8, rest)) == 2 * 8 * 2


def test_a_result_is_waited_for():
    waiting = body(line("MUFU.EX2 R1, R1", sets=0), line("FADD R1, R1, R1", waits=1))
    assert cycles(waiting, exponent=50) == 51
    assert cycles(body(line("LDG.E R1, [R2]", sets=3), line("FADD R1, R1, R1", waits=0b1000)), load=400) == 401


REST = [line("FADD R1, R2, R3", 15)] * 4


def test_products_of_both_groups_queue_for_the_tensor_core():
    assert cycles(body(line(PV), line(ENDED), *REST), left=0, products=0) == pytest.approx(2 * 64, abs=2)
    assert cycles(body(line(PV), line(ENDED), *REST), left=10, products=0) == pytest.approx(2 * 74, abs=2)


def test_a_product_from_registers_holds_its_warp_up_and_one_from_shared_memory_does_not():
    work = [line("FADD R1, R2, R3", 15)] * 20
    beside = cycles(body(line(QK), line(QK), *work, line(ENDED)))
    behind = cycles(body(line(QK), line(PV), *work, line(ENDED)), left=0)
    assert beside == pytest.approx(300, abs=10) and behind > 300 + 60


def test_products_of_another_type_cost_a_change():
    same, mixed = (cycles(body(line(QK), line(kind), line(ENDED), *REST), change=100) for kind in (QK, INTEGERS))
    assert mixed == pytest.approx(same + 2 * 2 * 100, abs=40)


TILES_AWAITED = body(line(TRY), line(TRY), line(QK), line(ENDED), line("FADD R1, R2, R3", 15), line(RELEASE))


def test_tiles_come_no_faster_than_their_bytes_and_no_sooner_than_their_slots_are_free():
    assert cycles(TILES_AWAITED, roles=ROLES, bytes=2.0, l2=0) == pytest.approx(2 * 1000 / 2, rel=0.01)
    two, three, four = (cycles(TILES_AWAITED, slots=n, roles=ROLES, l2=600) for n in (2, 3, 4))
    assert two > 1.3 * three and three > four


BEGIN, PASS = "BAR.SYNC.DEFER_BLOCKING 0x{}, 0x100", "BAR.ARV 0x{}, 0x100"


def in_turns(passed=PASS):
    return [
        body(line(BEGIN.format(own)), line(PV), line(passed.format(other)), line(ENDED), *REST)
        for own, other in ((6, 7), (7, 6))
    ]


def test_groups_take_turns():
    assert cycles(*in_turns(), left=0, turn=100) == pytest.approx(2 * 2 * 100, abs=20)


def test_a_turn_that_is_never_passed_is_waited_for_for_ever():
    assert cycles(*in_turns("FADD R{}, R1, R2")) == float("inf")


@pytest.mark.slow
def test_the_kernel_takes_the_cycles_that_were_measured():
    rows, failures = compiled(
        None, rf"^sm_90 block_sparse_attention ({'|'.join(MEASURED)}), D 128, bf16 out, hopper$", 2
    )
    assert failures == []
    played = {row.products: row.order.cycles for row in rows}
    assert played == pytest.approx(MEASURED, rel=0.15)
