"""Products with their epilogue beside the tensor cores: how a bench runs them, without a GPU, and what compiles."""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from beside_cases import activation_beside, qkv_beside, residual_beside
from test_aot import GOOD, run

from bench import ops
from bench.aot import disassembly, gates
from bench.beside import BESIDE, VARIANTS, running
from bench.cases import cases, select
from bench.hopper import HOPPER
from bench.hopper import running as running_attention
from bench.inputs import make
from bench.measure.comparison import Bench, implementations
from bench.measure.gates import problems
from bench.peers.registry import PEERS
from happyhorse_fast.kernels.launch import beside_of, config_for
from happyhorse_fast.ops.linear import triton as linear

CPU = torch.device("cpu")
TINY, SMALL = cases("tiny"), cases("small")


def test_the_tables_ask_for_none_and_the_bench_does():
    for stem, variants in VARIANTS.items():
        for variant in variants:
            committed = config_for(stem, variant, 90)
            assert not committed.beside
            with running(BESIDE) as backend:
                assert backend == "triton" and config_for(stem, variant, 90) == beside_of(committed)
                assert not config_for(stem, variant, 100).beside
            for other in ("triton", "cuda", HOPPER):
                with running(other) as backend:
                    assert backend == other and not config_for(stem, variant, 90).beside
    with running_attention(BESIDE) as kernel:
        assert kernel == BESIDE, "attention has none"


def test_it_is_an_implementation_of_the_ops_that_have_it():
    for words, wanted in (
        ("residual-proj/tiny", [BESIDE]),
        ("residual-down/tiny", [BESIDE]),
        ("swiglu7/tiny,gelu7/tiny", [BESIDE]),
        ("quantize/tiny,window/tiny", []),
        ("qkv_linear/tiny", []),  # heads of 64
    ):
        for case in select(TINY, words):
            assert implementations(case, "triton", [BESIDE]) == ["triton", *wanted], case.name
    assert [implementations(c, "triton", [BESIDE])[1:] for c in select(SMALL, "qkv_linear")] == [[BESIDE]] * 3
    assert ops.other_backends(CPU)[1][BESIDE] == "needs a GPU"


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", select(TINY, "residual"), ids=lambda case: case.name)
def test_the_gates_of_a_residual_pass_dry(case):
    given = make(case, CPU)
    with residual_beside():
        assert problems(case, given, BESIDE) == []


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", select(TINY, "activation"), ids=lambda case: case.name)
def test_the_gates_of_an_activation_pass_dry(case):
    given = make(case, CPU)
    with activation_beside():
        assert problems(case, given, BESIDE) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", select(TINY, "activation"), ids=lambda case: case.name)
def test_the_gates_of_an_activation_see_another_scale(case):
    given = make(case, CPU)
    wrong = ("y = swiglu7(gate, up)", "y = swiglu7(gate, up) * 1.01")
    if case.part == "gelu7":
        wrong = ("y = gelu7(value)", "y = gelu7(value) * 1.01")
    with activation_beside(replace=[wrong]):
        assert any("slope" in problem for problem in problems(case, given, BESIDE))


def test_the_gate_of_exact_sums_is_for_kernels_that_have_them():
    (case,) = select(TINY, "residual-proj/tiny/int8")
    given = make(case, CPU)
    with residual_beside():
        assert "tile distance" in problems(case, given, "triton")[0]
    assert problems(case, given, "triton") == []
    wrong = given | {"x_scale": given["x_scale"] * 1.001}
    with residual_beside(replace=[("return 2.0**self.exponent", "return 1.001 * 2.0**self.exponent")]):
        assert problems(case, wrong, BESIDE), "a scale that is 0.1 % off"


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", select(SMALL, "qkv_linear"), ids=lambda case: case.name)
def test_the_gates_of_qkv_pass_dry(case):
    given = make(case, CPU)
    with qkv_beside():
        assert problems(case, given, BESIDE) == []


def test_it_takes_turns_with_the_committed_kernel_and_a_bare_product(monkeypatch):
    """As on a GPU, but dry: each in the kernel of its own."""
    launched = []
    real = linear.launch_beside
    monkeypatch.setattr(linear, "launch_beside", lambda *a: (launched.append("beside"), real(*a)))
    (case,) = select(TINY, "residual-proj/tiny/bf16")
    peers = [peer for peer in PEERS if peer.name == "torch.mm bf16 (product only)"]
    with residual_beside(impl="triton"):
        bench = Bench(CPU, "triton", seconds=0.0, peers=peers, also=[BESIDE])
        entries = ops.run(bench, [case], None, time.monotonic() + 60)
    assert [(entry["impl"], entry["verified"]) for entry in entries] == [("triton", True), (BESIDE, True)]
    assert len({entry["span"] for entry in entries}) == 1
    assert all(entry["peers"].keys() == {"torch.mm bf16 (product only)"} for entry in entries)
    assert len(launched) >= 2, "its gate, and its turn"


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "core", "loop"), [("fp8", "QGMMA", (4, [1])), ("int8", "IGMMA", (8, [2]))])
def test_an_epilogue_that_is_not_beside_the_tensor_cores_is_caught(fmt, core, loop):
    config = beside_of(GOOD.config)
    row = replace(
        GOOD, config=config, num_warps=4, num_stages=3, tile={}, products=fmt, detail=f"{fmt}, residual, beside",
        opcodes=Counter({core: 16, "STSM": 32}), beside=gates.Beside([loop, loop], [16, 16]),
    )  # fmt: skip
    assert gates.problems(row) == []

    def found(**changes):
        return gates.problems(replace(row, beside=replace(row.beside, **changes)))

    behind = (loop[0], [0])
    for wrong in ([loop], [loop, behind], [loop, (loop[0], [*loop[1], 0])], [loop, (loop[0] // 2, loop[1])], []):
        (said,) = found(loops=wrong)
        assert "loops over slots" in said
    assert "1 instructions that write what a product under way adds to" in found(overwritten=1)[0]
    assert "additions of [16, 4] bytes" in found(additions=[16, 4])[0]
    assert "additions of [] bytes" in found(additions=[])[0]
    stores = replace(row, opcodes=Counter({core: 16, "STSM": 32, "STG": 1}))
    assert "additions of [16, 16] bytes and 1 STG" in gates.problems(stores)[0]
    assert "16 STSM, 32 wanted" in gates.problems(replace(row, opcodes=Counter({core: 16, "STSM": 16})))[0]
    stored = replace(
        row, kernel="fp8_linear_activation_beside_kernel", detail=f"{fmt}, plain, beside",
        beside=gates.Beside([loop, loop], [], [16]),
    )  # fmt: skip
    assert gates.problems(stored) == []
    for narrow in ([16, 8], [4], []):
        (said,) = gates.problems(replace(stored, beside=gates.Beside([loop, loop], [], narrow)))
        assert f"stores of {narrow} bytes" in said


LISTING = """
        /*0010*/  QGMMA.64x256x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24 ;
        /*0020*/  QGMMA.64x256x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0 ;
        /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/  REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR22][R70.64], R28 ;
        /*0050*/  REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR22][R70.64], R28 ;
        /*0060*/  REDG.E.ADD.F32x2.FTZ.RN.STRONG.GPU desc[UR22][R70.64], R28 ;
"""


STORED = """
        /*0010*/              @!P1 STG.E.128 desc[UR26][R6.64], R8 ;
        /*0020*/                   STG.E.64 desc[UR26][R6.64], R8 ;
        /*0030*/                   STG.E desc[UR26][R6.64], R8 ;
        /*0040*/                   STG.E.U16 desc[UR26][R6.64], R8 ;
        /*0050*/                   STG.E.U8 desc[UR26][R6.64], R8 ;
"""


def test_waits_additions_and_stores_of_a_listing():
    assert disassembly.stores(STORED) == [16, 8, 4, 2, 1]
    assert disassembly.stores(LISTING) == []
    assert disassembly.products_and_waits(LISTING.splitlines()) == (2, [1])
    assert disassembly.additions(LISTING) == [16, 4, 8]


SERIAL = r"""
import importlib.util
import sys
from pathlib import Path

name = "happyhorse_fast.kernels.product_beside"
source = Path(importlib.util.find_spec(name).origin).read_text()
old = "(warpgroup_mma_wait(1, deps=[left]),)"
assert source.count(old) == 1
path = Path({root!r}) / "serial.py"
path.write_text(source.replace(old, old.replace("1", "0")))
spec = importlib.util.spec_from_file_location(name, path)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])

from bench.aot.cases import cases
from bench.aot.compile import measure
from bench.aot.gates import problems
from bench.aot.recording import record

case = next(c for c in cases() if (c.arch, c.detail) == (90, "bf16, residual, float32 out, beside"))
print(problems(measure(*record([(case, case.arch, case.launch)]))))
"""


@pytest.mark.slow
def test_a_wait_behind_a_slots_own_products_is_seen(tmp_path):
    done = run("-c", SERIAL.format(root=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(products, left under way) [(4, [0]), (4, [0])], not [(4, [1]), (4, [1])]" in done.stdout
