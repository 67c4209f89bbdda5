"""Kernels for Hopper: how a bench runs them, without a GPU, and what compiles of those of products."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from beside_cases import activation_beside, qkv_beside, residual_beside
from test_aot import GOOD, run

from bench import measure, ops
from bench.aot import disassembly, gates
from bench.cases import cases, select
from bench.hopper import ENTRIES, FORM, HOPPER, running
from bench.inputs import make
from bench.measure.comparison import Bench, implementations
from bench.measure.gates import problems
from bench.peers.registry import PEERS
from happyhorse_fast.kernels.launch import config_for, hopper_of, table
from happyhorse_fast.ops.linear import triton as linear

CPU = torch.device("cpu")
TINY, SMALL = cases("tiny"), cases("small")


def test_hopper_warps_are_an_implementation_of_their_own_whatever_the_table_says():
    before, seen = json.dumps(table("attention")), []
    with running(HOPPER) as backend:
        assert backend == "triton"
        assert config_for("attention", "bf16_d128", 90).hopper
        assert not config_for("attention", "bf16_d128", 80).hopper
        assert not config_for("attention", "bf16_d128_strided", 90).hopper
        with running("triton"):
            assert not any(config_for("attention", f"{f}_d128", 90).hopper for f in ("bf16", "fp8"))
        assert config_for("attention", "bf16_d128", 90).hopper
        elsewhere = threading.Thread(target=lambda: seen.append(config_for("attention", "fp8_d64", 90).hopper))
        elsewhere.start()
        elsewhere.join()
    with running("triton"), running("auto"):
        assert not config_for("attention", "bf16_d128", 90).hopper, "what the call around it passes"
    with running("auto"):
        assert config_for("attention", "bf16_d128", 90).hopper, "what is committed"
    assert seen == [False], "another thread launches what is committed"
    assert json.dumps(table("attention")) == before
    attention, norm = select(TINY, "window/tiny/bf16,quantize/tiny/bf16")
    assert implementations(attention, "triton", [HOPPER, "cuda"]) == ["triton", HOPPER, "cuda"]
    assert implementations(norm, "triton", [HOPPER, "cuda"]) == ["triton", "cuda"]
    int8, _, chosen = select(TINY, "window/tiny/int8_qk,select_blocks-25%/tiny/int8_qk")
    _, found = select(TINY, "attention-dense/tiny/bf16")
    for case in (int8, found):
        assert implementations(case, "triton", [HOPPER, "cuda"]) == ["triton", HOPPER]
    assert implementations(chosen, "triton", [HOPPER, "cuda"]) == ["triton", "cuda"]


@pytest.mark.parametrize("stem", ENTRIES)
def test_a_table_asks_only_for_kernels_that_there_are(stem):
    entries = table(stem)
    asked = {name for name in entries if not name.endswith(FORM) and entries[name].get("90", {}).get("hopper")}
    assert asked and asked <= {*ENTRIES[stem]}
    assert not any(of.get("hopper") for name in entries for arch, of in entries[name].items() if arch != "90")
    for impl, runs in ((HOPPER, True), ("triton", False)):
        with running(impl):
            assert {config_for(stem, name, 90).hopper for name in ENTRIES[stem]} == {runs}
            assert not any(config_for(stem, name, 100).hopper for name in ENTRIES[stem])


def test_it_is_an_implementation_of_the_ops_that_have_it():
    for words, wanted in (
        ("residual-proj/tiny", [HOPPER]),
        ("residual-down/tiny", [HOPPER]),
        ("swiglu7/tiny,gelu7/tiny", [HOPPER]),
        ("quantize/tiny", []),
        ("qkv_linear/tiny", []),  # heads of 64
    ):
        for case in select(TINY, words):
            assert implementations(case, "triton", [HOPPER]) == ["triton", *wanted], case.name
    assert [implementations(c, "triton", [HOPPER])[1:] for c in select(SMALL, "qkv_linear")] == [[HOPPER]] * 3
    assert ops.other_backends(CPU)[1][HOPPER] == "needs a GPU"


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", select(TINY, "residual"), ids=lambda case: case.name)
def test_the_gates_of_a_residual_pass_dry(case):
    given = make(case, CPU)
    with residual_beside():
        assert problems(case, given, HOPPER) == []


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", select(TINY, "activation"), ids=lambda case: case.name)
def test_the_gates_of_an_activation_pass_dry(case):
    given = make(case, CPU)
    with activation_beside():
        assert problems(case, given, HOPPER) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", select(TINY, "activation"), ids=lambda case: case.name)
def test_the_gates_of_an_activation_see_another_scale(case):
    given = make(case, CPU)
    wrong = ("y = swiglu7(gate, up)", "y = swiglu7(gate, up) * 1.01")
    if case.part == "gelu7":
        wrong = ("y = gelu7(value)", "y = gelu7(value) * 1.01")
    with activation_beside(replace=[wrong]):
        assert any("slope" in problem for problem in problems(case, given, HOPPER))


def test_the_gate_of_exact_sums_is_for_kernels_that_have_them():
    (case,) = select(TINY, "residual-proj/tiny/int8")
    given = make(case, CPU)
    with residual_beside(), mock.patch.object(measure.gates, "HOPPER", "another"):
        assert "tile distance" in problems(case, given, HOPPER)[0]
    assert problems(case, given, "triton") == []
    wrong = given | {"x_scale": given["x_scale"] * 1.001}
    with residual_beside(replace=[("return 2.0**self.exponent", "return 1.001 * 2.0**self.exponent")]):
        assert problems(case, wrong, HOPPER), "a scale that is 0.1 % off"


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", select(SMALL, "qkv_linear"), ids=lambda case: case.name)
def test_the_gates_of_qkv_pass_dry(case):
    given = make(case, CPU)
    with qkv_beside():
        assert problems(case, given, HOPPER) == []


def test_it_takes_turns_with_the_committed_kernel_and_a_bare_product(monkeypatch):
    """As on a GPU, but dry: each in the kernel of its own."""
    launched = []
    real = linear.launch_hopper
    monkeypatch.setattr(linear, "launch_hopper", lambda *a: (launched.append("hopper"), real(*a)))
    (case,) = select(TINY, "residual-proj/tiny/bf16")
    peers = [peer for peer in PEERS if peer.name == "torch.mm bf16 (product only)"]
    with residual_beside(impl="triton"):
        bench = Bench(CPU, "triton", seconds=0.0, peers=peers, also=[HOPPER])
        entries = ops.run(bench, [case], time.monotonic() + 60)
    assert [(entry["impl"], entry["verified"]) for entry in entries] == [("triton", True), (HOPPER, True)]
    assert len({entry["span"] for entry in entries}) == 1
    assert all(entry["peers"].keys() == {"torch.mm bf16 (product only)"} for entry in entries)
    assert len(launched) >= 2, "its gate, and its turn"


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "core", "loop"), [("fp8", "QGMMA", (4, [1])), ("int8", "IGMMA", (8, [2]))])
def test_an_epilogue_that_is_not_beside_the_tensor_cores_is_caught(fmt, core, loop):
    config = hopper_of(GOOD.config)
    row = replace(
        GOOD, config=config, num_warps=4, num_stages=3, tile={}, products=fmt, detail=f"{fmt}, residual, hopper",
        opcodes=Counter({core: 16, "STSM": 32}), beside=gates.Beside([loop, loop], [4, 16, 16], [16, 16]),
    )  # fmt: skip
    assert gates.problems(row) == []

    def found(**changes):
        return gates.problems(replace(row, beside=replace(row.beside, **changes)))

    behind = (loop[0], [0])
    for wrong in ([loop], [loop, behind], [loop, (loop[0], [*loop[1], 0])], [loop, (loop[0] // 2, loop[1])], []):
        (said,) = found(loops=wrong)
        assert "loops over slots" in said
    assert "1 instructions that write what a product under way adds to" in found(overwritten=1)[0]
    for narrow in ([16, 8], [4], []):
        assert f"stores of {narrow} bytes" in found(stores=narrow)[0]
    for narrow in ([16, 8, 8], [4], []):
        assert f"loads of {narrow} bytes for 2 stores" in found(loads=narrow)[0]
    assert "16 STSM, 32 wanted" in gates.problems(replace(row, opcodes=Counter({core: 16, "STSM": 16})))[0]
    stored = replace(
        row, kernel="fp8_linear_activation_beside_kernel", detail=f"{fmt}, plain, hopper",
        beside=gates.Beside([loop, loop], [4], [16]),
    )  # fmt: skip
    assert gates.problems(stored) == []
    for narrow in ([16, 8], [4], []):
        (said,) = gates.problems(replace(stored, beside=gates.Beside([loop, loop], [4], narrow)))
        assert f"stores of {narrow} bytes" in said


LISTING = """
        /*0010*/  QGMMA.64x256x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24 ;
        /*0020*/  QGMMA.64x256x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0 ;
        /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   LDG.E R4, desc[UR26][R6.64] ;
        /*0050*/              @!P1 LDG.E.128 R8, desc[UR26][R6.64+0x200] ;
"""


STORED = """
        /*0010*/              @!P1 STG.E.128 desc[UR26][R6.64], R8 ;
        /*0020*/                   STG.E.64 desc[UR26][R6.64], R8 ;
        /*0030*/                   STG.E desc[UR26][R6.64], R8 ;
        /*0040*/                   STG.E.U16 desc[UR26][R6.64], R8 ;
        /*0050*/                   STG.E.U8 desc[UR26][R6.64], R8 ;
"""


def test_waits_loads_and_stores_of_a_listing():
    assert disassembly.widths(STORED, "STG") == [16, 8, 4, 2, 1]
    assert disassembly.widths(LISTING, "STG") == []
    assert disassembly.widths(LISTING, "LDG") == [4, 16]
    assert disassembly.products_and_waits(LISTING.splitlines()) == (2, [1])


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

case = next(c for c in cases() if (c.arch, c.detail) == (90, "bf16, residual, float32 out, hopper"))
print(problems(measure(*record([(case, case.arch, case.launch)]))))
"""


@pytest.mark.slow
def test_a_wait_behind_a_slots_own_products_is_seen(tmp_path):
    done = run("-c", SERIAL.format(root=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(products, left under way) [(4, [0]), (4, [0])], not [(4, [1]), (4, [1])]" in done.stdout
