"""Kernels compiled without a GPU: a few here, all in `make aot-check`; and what its gates must catch."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.aot import gates
from bench.aot.__main__ import compiled
from bench.aot.disassembly import overwritten
from happyhorse_fast.kernels.launch import ARCHITECTURES, LaunchConfig

ROOT = Path(__file__).parents[2]


GOOD = gates.Row(
    stem="linear",
    kernel="fp8_linear_kernel",
    variant="fp8_plain",
    detail="fp8, plain, bf16 out",
    arch=90,
    config=LaunchConfig(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4, descriptors=True),
    tile={"block_m": 128, "block_n": 256, "block_k": 128},
    num_warps=8,
    num_stages=4,
    fp_fusion=True,
    products="fp8",
    registers=197,
    stack=0,
    shared=213_024,
    opcodes=Counter(QGMMA=4),
    triton="3.7.1",
)


def run(*command):
    """In a process whose Triton compiles: this one interprets."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )


# Compiled -------------------------------------------------------------------------------------------------------------

SOME = {
    "qkv": (
        "rmsnorm_quantize fp8 out, branch",
        "qkv_linear fp8, fp8 out",
        "qkv_linear int8, int8_qk out, hopper",
    ),
    "attention": (
        "block_sparse_attention fp8, D 128, bf16 out",
        "block_sparse_attention bf16, D 128, bf16 out, hopper",
        "block_sparse_attention int8_qk, D 128, bf16 out, hopper",
        "block_sparse_attention fp8, D 128, bf16 out, hopper",
    ),
    "row_quantization": ("quantize_rows 13696 channels, Hadamard",),
    "linear": (
        "fp8_linear_activation fp8, swiglu7, fp8 out",
        "fp8_linear_residual fp8, residual, float32 out",
        "fp8_linear_residual bf16, residual, float32 out, hopper",
    ),
    "block_selection": ("select_blocks bf16, 1464 blocks, by number, max",),
}


slow = pytest.mark.slow  # 3 to 5 s each, and `make check` compiles all of them first


@pytest.mark.parametrize("stem", [pytest.param(s, marks=() if s == "linear" else slow) for s in SOME])
def test_a_kernel_of_every_stem_holds_its_gates_on_hopper(stem):
    rows, failures = compiled(None, "|".join(f"^sm_90 {case}$" for case in SOME[stem]), 1)
    assert failures == []
    assert len(rows) >= len(SOME[stem])
    assert {row.stem for row in rows} == {stem}
    assert [problem for row in rows for problem in gates.problems(row)] == []


TABLES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "kernels" / "configs").glob("*.json")}


def test_every_launch_table_has_a_case_here():
    assert set(SOME) == set(TABLES)


@pytest.mark.parametrize(("stem", "variant"), [(stem, variant) for stem in TABLES for variant in TABLES[stem]])
def test_every_entry_is_there_for_each_architecture_that_can(stem, variant):
    """Entries for strided tensors: where others use descriptors, which only sm_90 and sm_100 do in attention."""
    able = [a for a in ARCHITECTURES if "fp8" not in variant or a >= 89]
    for end, only in (("_strided", (90, 100)), ("_hopper", (90,))):
        able = only if variant.endswith(end) else able
    assert sorted(map(int, TABLES[stem][variant])) == list(able)


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        # Deeper than shared memory: Triton compiles it without a word.
        ("table('linear')['fp8_plain']['90']['num_stages'] = 6", "bytes of shared memory, sm_90 has 232448"),
        # One step of a wide tile in four warps: more registers than there are.
        pytest.param("table('linear')['fp8_plain']['90']['num_warps'] = 4", "spills: ", marks=slow),
        # A launcher that leaves it to the compiler's default.
        pytest.param("launch.FP_FUSION = None", "launched without enable_fp_fusion", marks=slow),
        # One that launches something else than the table says.
        pytest.param(
            "fp8_linear.config_of = lambda *_: config_for('linear', 'bf16_plain', 90)",
            "launched with tiles",
            marks=slow,
        ),
    ],
    ids=["stages", "warps", "fusion", "another entry"],
)
def test_a_planted_mistake_is_caught(plant, problem):
    code = f"""
from bench.aot.cases import cases
from bench.aot.compile import measure
from bench.aot.gates import problems
from bench.aot.recording import record
from happyhorse_fast.kernels import launch
from happyhorse_fast.kernels.launch import config_for, table
from happyhorse_fast.ops.linear import triton as fp8_linear
{plant}
case = next(c for c in cases() if (c.arch, c.detail) == (90, "fp8, plain, bf16 out"))
print(problems(measure(*record([(case, case.arch, case.launch)]))))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert problem in done.stdout


def test_it_does_not_run_where_kernels_are_interpreted():
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot.compile", "rows", "sm_90 rmsnorm_quantize", "1"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "TRITON_INTERPRET must not be set" in done.stderr


# The gates ------------------------------------------------------------------------------------------------------------


def test_a_good_row_holds():
    assert gates.problems(GOOD) == []


def test_int8_has_the_tensor_cores_of_sm_100_from_triton_3_8_on():
    assert replace(GOOD, arch=100, products="int8_qk", triton="3.7.1").wanted == ["IMMA", "UTCHMMA"]
    assert replace(GOOD, arch=100, products="int8_qk", triton="3.8.0").wanted == ["UTCHMMA", "UTCIMMA"]
    assert replace(GOOD, arch=90, products="int8_qk", triton="3.10.0").wanted == ["HGMMA", "IGMMA"]


def test_spills_are_known_by_table_and_architecture_and_never_on_hopper():
    spilling = replace(GOOD, arch=100, opcodes=Counter(UTCQMMA=8, STL=1), stack=8)
    assert len(gates.problems(spilling)) == 2
    assert gates.problems(replace(spilling, stem="qkv")) == []
    assert not any(arch == 90 for _, arch in gates.MAY_SPILL)


REDUCING = replace(GOOD.config, reduce=True)


def having(**changed):
    """So many of these instructions, and of the others as many as there are."""
    return {"opcodes": +Counter({**GOOD.opcodes, **changed})}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack": 16}, "16 bytes of stack"),
        (having(STL=3), "spills: 3 STL, 0 LDL"),
        (having(LDL=2), "spills: 0 STL, 2 LDL"),
        ({"registers": 256}, "256 registers, at most 255 allowed"),
        ({"shared": 232_449}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        (having(QGMMA=0, HMMA=64), "tensor-core instructions HMMA, not QGMMA"),
        (having(HMMA=1), "tensor-core instructions HMMA, QGMMA, not QGMMA"),
        (having(QGMMA=0), "tensor-core instructions none, not QGMMA"),
        ({"products": "bf16"}, "tensor-core instructions QGMMA, not HGMMA"),
        ({"products": "int8_qk"}, "tensor-core instructions QGMMA, not HGMMA, IGMMA"),
        ({"products": "none"}, "tensor-core instructions QGMMA, not none"),
        ({"num_warps": 4}, "launched with 4 warps and 4 stages, not as 'fp8_plain' says"),
        ({"tile": {"block_k": 64}}, "launched with tiles {'block_k': 64}, not {'block_k': 128} as 'fp8_plain' says"),
        ({"fp_fusion": False}, "launched without enable_fp_fusion=FP_FUSION"),
        ({"config": replace(GOOD.config, block_n=192)}, "block_n must be a power of two, got 192"),
        (having(QGMMA=0, QMMA=4) | {"arch": 80}, "sm_80 has no e4m3 tensor cores"),
        ({"config": REDUCING}, "0 additions by the memory, some wanted"),
        (having(UTMAREDG=4), "4 additions by the memory, none wanted"),
        (
            having(UTMAREDG=4, STG=2) | {"config": REDUCING},
            "2 STG and pointers  beside additions by the memory",
        ),
        (
            having(UTMAREDG=4) | {"config": REDUCING, "pointers": ("out", "x_scale")},
            "0 STG and pointers out, x_scale beside additions by the memory",
        ),
        ({"arch": 100}, "tensor-core instructions QGMMA, not UTCQMMA"),
        ({"nan_lost": 2, "nan_kept": 4}, "2 minima and maxima that lose NaN, 4 that keep it"),
    ],
)
def test_a_bad_row_is_caught(change, problem):
    row = replace(GOOD, **change)
    assert gates.problems(row)[0] == f"sm_{row.arch} fp8_linear fp8, plain, bf16 out, Triton 3.7.1: " + (
        problem if row.arch != 80 else f"{problem} (sm_89 and later have)"
    )


@pytest.mark.parametrize("detail", ["fp8, swiglu7, bf16 out", "bf16, gelu7, fp8 out", "int8 out", "bf16, int8_qk out"])
def test_a_clamp_must_be_there_and_keep_nan(detail):
    row = replace(GOOD, detail=detail)
    assert gates.problems(replace(row, nan_kept=1)) == []
    assert gates.problems(row)[0].endswith("0 minima and maxima that lose NaN, 0 that keep it")
    assert gates.problems(replace(GOOD, stem="attention", nan_lost=9)) == [], "a softmax may lose it"


def test_steps_of_the_hopper_kernel_in_another_order_are_caught():
    config = replace(GOOD.config, num_warps=4, num_stages=2, hopper=True)
    turns, barriers = [(16, 0, 1)] * 4, [(0, 128), (1, 0), (6, 256), (7, 256)]
    order = gates.Order([64, 65, 64, 66], turns, barriers)
    row = replace(
        GOOD, config=config, num_warps=4, num_stages=2, tile={}, products="bf16", opcodes=Counter(HGMMA=96), order=order
    )
    assert gates.problems(row) == []

    def found(row, **changes):
        return gates.problems(replace(row, order=replace(row.order, **changes)))

    (moved,) = found(row, exponents=[64, 2, 64, 64])
    assert moved.endswith("3 steps with 64 exponents beside products, 4 wanted")
    assert found(row, turns=turns[:3])[0].endswith("3 turns, 4 wanted")
    assert "1 instructions that write what a product" in found(row, overwritten=1)[0]
    for wrong in ((8, 8, 1), (0, 16, 1), (16, 0, 0), (16, 0, 2), (0, 0, 1)):
        (said,) = found(row, turns=[*turns[:2], wrong, turns[3]])
        assert f"a turn of {wrong[0]} products, passed {wrong[2]} times, with {wrong[1]} behind it" in said
    for other in ([(6, 256)], [(6, 256), (7, 128)], [(4, 128), (6, 256), (7, 256)]):
        assert "two of both groups" in found(row, barriers=other)[0], "Triton has come to use more"
    order = gates.Order([66] * 6, [(8, 0, 1)] * 6, barriers, behind_pv=105)
    e4m3 = replace(row, products="fp8", opcodes=Counter(QGMMA=48), order=order)
    assert gates.problems(e4m3) == []
    assert "two of both groups" in found(e4m3, barriers=[(1, 0)])[0]
    assert "5 steps with 64 exponents beside products, 6 wanted" in found(e4m3, exponents=[66, 0, 66, 66, 66, 66])[0]
    assert "4 turns, 6 wanted" in found(e4m3, turns=[(8, 0, 1)] * 4)[0]
    for wrong in (0, 113):
        assert f"{wrong} instructions between PV and the next QK" in found(e4m3, behind_pv=wrong)[0]


QK = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;"]
PV = [
    "HGMMA.64x128x16.F32.BF16 R152, R88, gdesc[UR12].tnspB, R152 ;",
    "HGMMA.64x128x16.F32.BF16 R152, R92, gdesc[UR12].tnspB, R152, gsb0 ;",
]
ENDED = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"


@pytest.mark.parametrize(
    ("loop", "wanted"),
    [
        ([*QK, *PV, ENDED, "FMUL R91, R24, R5 ;"], 0),
        ([*QK, *PV, "FMUL R91, R24, R5 ;", ENDED], 1),
        ([*QK, *PV, "FMUL R96, R24, R5 ;", ENDED], 0),
        (["IMAD.WIDE R94, R24, R5, RZ ;", *QK, *PV], 1),
        ([*QK, "MUFU.EX2 R87, R87 ;", *PV, ENDED], 1),
    ],
    ids=["behind its end", "left operand", "another register", "in the next iteration", "sum"],
)
def test_registers_that_products_under_way_read(loop, wanted):
    assert overwritten([[f"/*0000*/ {line}" for line in loop]]) == wanted


PASS = "    pass_turn(GROUP)\n"
PV_DONE = "    acc = warpgroup_mma_wait(0, deps=[pv_pending])\n"


@slow
@pytest.mark.parametrize(
    ("replaced", "problem"),
    [
        # What `hold_order` is for: if this passes, it may no longer be needed.
        ([("    hold_order(rings)\n" + PV_DONE, PV_DONE)], "2 steps with 64 exponents beside products, 4 wanted"),
        ([("    pv_pending = ", PASS + "    pv_pending = ")], "a turn of 8 products, passed 2 times, with 8 behind"),
        ([(PASS, "")], "passed 0 times"),
        # The wait for PV in the next step alone: P's words are then written while PV reads them.
        (
            [(PV_DONE, "    acc = pv_pending\n"), ("Running(zero,", "Running(warpgroup_mma_init(zero),")],
            "instructions that write what a product under way reads",
        ),
    ],
    ids=["exponents behind PV", "turn before PV", "no turn", "PV not awaited"],
)
def test_the_compiled_order_is_seen(replaced, problem, tmp_path):
    done = run("-c", MOVED.format(root=str(tmp_path), replaced=replaced))
    assert done.returncode == 0, done.stderr[-2000:]
    assert problem in done.stdout


KEY = r"""
import importlib
import importlib.util
import sys
from pathlib import Path

original = importlib.import_module("happyhorse_fast.kernels.{module}")
source = Path(original.__file__).read_text()
assert source.count({old!r}) == 1
for number, text in enumerate((source, source.replace({old!r}, {new!r}))):
    path = Path({root!r}) / f"sizes{{number}}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(module.{function}.cache_key)
"""


@pytest.mark.parametrize(
    ("module", "function", "old", "new"),
    [
        ("hopper_sizes", "sizes_of", "return self.v_bits == 8", "return self.v_bits < 16"),
        ("product_beside", "product_of", "return 2 if self.int8 else 1", "return 1 + self.int8"),
        ("qkv_heads", "heads_of", "return self.q + 2 * self.kv", "return 2 * self.kv + self.q"),
        ("activation_beside", "activation_of", "return self.results * self.per", "return self.per * self.results"),
    ],
)
def test_another_property_of_constants_is_another_kernel_to_tritons_cache(module, function, old, new, tmp_path):
    done = run("-c", KEY.format(root=str(tmp_path), module=module, function=function, old=old, new=new))
    assert done.returncode == 0, done.stderr[-2000:]
    keys = done.stdout.split()
    assert len(keys) == len(set(keys)) == 2


MOVED = r"""
import importlib.util
import sys
from pathlib import Path

from bench.aot.cases import cases
from bench.aot.compile import measure
from bench.aot.gates import problems
from bench.aot.recording import record
from happyhorse_fast.kernels import attention_hopper as kernel
from happyhorse_fast.kernels import hopper_bounded

source = Path(hopper_bounded.__file__).read_text()
for old, new in {replaced!r}:
    assert source.count(old) == 1, old
    source = source.replace(old, new)
path = Path({root!r}) / "moved.py"
path.write_text("from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init\n" + source)
spec = importlib.util.spec_from_file_location("moved", path)
moved = sys.modules["moved"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(moved)
kernel.attend_bounded = moved.attend_bounded
case = next(c for c in cases() if (c.arch, c.detail) == (90, "bf16, D 128, bf16 out, hopper"))
print(problems(measure(*record([(case, case.arch, case.launch)]))))
"""


def test_an_entry_that_no_case_launches_is_caught():
    missing = gates.not_compiled([GOOD])
    assert "linear 'bf16_plain' for sm_80: no case launches it" in missing
    assert not any("'fp8_plain' for sm_90" in line for line in missing)


DIES = """
import os, sys
from bench.aot import recording

def work(launch):
    if launch.name == "raises":
        raise ValueError("planted")
    return os._exit(9) if launch.name == "dies" else launch.name

recording.KERNELS_EACH = 1
names = ["raises", "good", "dies", "good", "good"]
print(recording.in_forks(work, [recording.Launch("", name, "", "planted") for name in names], 1))
"""


def test_a_kernel_that_takes_its_process_with_it_hides_no_other_one():
    done = run("-c", DIES)
    assert done.returncode == 0, done.stderr[-2000:]
    *told, last = done.stdout.splitlines()
    results, (raised, died) = eval(last)
    assert results == ["good"] * 3 and "terminated abruptly" in died
    assert raised == "raises of planted does not compile: ValueError: planted"
    assert told[0] == "1/5 raises of planted: ValueError: planted" and told[1] == "2/5 good of planted: compiled"


def test_a_process_that_ends_early_is_a_failure(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert compiled(None, "", 1) == ([], ["compiling by Triton of this environment ended with 3"])
