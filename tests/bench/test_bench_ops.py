"""The gate and the table: a wrong kernel has no number, a slow one shows, a broken peer ends nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from comparison_cases import CPU, EAGER, FOREVER, SEEN, Counting, compared, standing_in

from bench import ops
from bench.bootstrap import ROOT
from bench.cases import cases, padded_rows, select
from bench.inputs import call, make, softmax
from bench.measure import comparison, gates
from bench.measure.comparison import Bench, groups
from bench.measure.conditions import Monitor
from bench.peers.registry import PEERS, bf16_inputs, split
from bench.report.tables import ops_table
from bench.results import Results, comparable, describe_machine, read
from happyhorse_fast import budgets
from happyhorse_fast.eager.mlp import swiglu7
from happyhorse_fast.ops.quantize import dequantize, to_e4m3

TINY = cases("tiny")
ACCUMULATOR = 1.5e-3
"""Relative error of a large sum of 5120 products in e4m3, by the emulator of Hopper's accumulator."""
pytestmark = pytest.mark.usefixtures("ceilings")


def shown(entry, bench=None):
    """The table of an entry."""
    peaks = [asdict(bench.measured)] if bench else []
    return ops_table({"gpu": "cpu", "commit": "abc", "entries": [entry], "peaks": peaks}, whole=True)


def planted(monkeypatch, change):
    """The reference's results, changed, in place of the implementation."""

    def changed(case, given, backend):
        results = list(call(case, given, backend))
        first = results[0].clone()
        results[0] = change(first).to(first.dtype)
        if case.op == "fp8_linear_residual":
            given["hidden"].copy_(results[0])
        return tuple(results)

    monkeypatch.setattr(gates, "call", changed)


def drop_tile(x):
    x[128:256, :64] = 0
    return x


WRONG = {
    "a dropped tile": drop_tile,
    "a scale 4 % off": lambda x: x.float() * 1.04,
    "rows shifted by one": lambda x: x.roll(1, 0),
    "an unwritten row": lambda x: x.float().index_fill(0, torch.tensor([5]), torch.nan),
}


@pytest.mark.quick(17)
@pytest.mark.parametrize(
    "name",
    [
        *("window/tiny/fp8", "window/tiny/int8_qk", "window/tiny/bf16", "attention-dense/tiny/bf16"),
        *("swiglu7/tiny", "residual-down/tiny", "qkv_linear/tiny/bf16", "quantize/tiny/bf16"),
        *("swiglu7/tiny/int8", "residual-down/tiny/int8", "qkv_linear/tiny/int8", "rows-down/tiny"),
    ],
)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_has_no_number(name, what, bench, monkeypatch, tmp_path):
    case = select(TINY, name)[-1]
    planted(monkeypatch, WRONG[what])
    bench.results = Results(tmp_path / "r.json", describe_machine(CPU))
    (entry,) = ops.run(bench, [case], time.monotonic() + 60)
    assert entry["verified"] is False
    assert entry["reason"]
    assert [entry[k] for k in ("median_ms", "tflops", "gbps", "roofline", "peers")] == [None, None, None, None, {}]
    (row,) = shown(entry).rows
    assert "not verified" in row[1] and not any(row[2:])
    (written,) = read(tmp_path / "r.json")["entries"]
    assert written == json.loads(json.dumps(entry))


@pytest.mark.parametrize("factor", [1, 1.01, 0.99])
def test_codes_may_differ_beside_a_boundary_alone(factor):
    """Sums with the error of Hopper's accumulator give other codes, whose slope one large value can decide."""
    noise = torch.Generator().manual_seed(0)
    sums = torch.randn(128, 2048, generator=noise)
    sums[0, :2] = torch.tensor([8.0, 34 / 7 - 1])  # 34, between the codes of 32 and 36
    moved = sums * (1 + ACCUMULATOR * torch.randn(sums.shape, generator=noise))
    moved[0, :2] = sums[0, :2] + torch.tensor([0.0, 1e-3])
    exact, scale = swiglu7(sums.double()), torch.tensor([0.125])
    y = dequantize(to_e4m3(swiglu7(moved) * factor / scale), scale, torch.float64)
    found = [
        problem
        for _, result, wanted, distance, slope in gates.compare_codes("y", y, exact, scale)
        for problem in budgets.violations(budgets.measure(result, wanted), distance=distance, slope=slope)
    ]
    assert bool(found) == (factor != 1)
    rounded = dequantize(to_e4m3(exact / scale), scale, torch.float64)
    assert budgets.measure(y, rounded).tile_slope > gates.CODE_SLOPE


@pytest.mark.parametrize(("precision", "seen"), [("int8", True), ("fp8", False)])
def test_sums_of_int8_codes_are_held_to_be_exact(precision, seen, monkeypatch):
    (case,) = select(TINY, f"residual-proj/tiny/{precision}")
    planted(monkeypatch, lambda x: x * (1 + 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))
    assert bool(gates.problems(case, make(case, CPU), "reference")) is seen


def test_a_kernel_that_raises_has_no_number(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gates, "call", broken)
    (entry,) = compared(bench, TINY[:1])
    assert (entry["verified"], entry["median_ms"]) == (False, None)
    assert "out of resource" in entry["reason"]


def test_a_sampled_gate_sees_an_unwritten_tile_anywhere(monkeypatch):
    case = select(cases("small"), "proj/small/bf16")[0]
    assert case.rows // 128 > gates.ALL_BLOCKS_UP_TO
    unseen = next(b for b in range(case.rows // 128) if b not in gates._blocks(case.rows // 128))

    def unwritten(x):
        x[unseen * 128 + 3] = torch.nan
        return x

    planted(monkeypatch, unwritten)
    assert "nothing wrote" in gates.problems(case, make(case, CPU), "reference")[0]


def test_a_slow_kernel_shows_in_the_table(bench, monkeypatch):
    case = select(TINY, "proj/tiny/bf16")[0]
    (honest,) = compared(bench, [case])

    def slow(*arguments):
        time.sleep(0.5)
        return call(*arguments)

    monkeypatch.setattr(comparison, "call", slow)
    (entry,) = compared(bench, [case])
    assert entry["verified"] and entry["median_ms"] > 500 > honest["median_ms"]
    assert entry["peers"]["eager"] / entry["median_ms"] < 0.5, "the peer is more than twice as fast"
    assert entry["roofline"] < honest["roofline"]
    assert "x: ours is SLOWER)" in shown(entry).rows[0][-1]


def test_a_peer_that_breaks_is_named_and_ends_nothing():
    def prepare(case, inputs):
        raise RuntimeError("no kernel image is available")

    both = Bench(CPU, "reference", seconds=0.0, peers=[standing_in("broken", prepare), EAGER])
    (case,) = select(TINY, "swiglu7/tiny/bf16")
    (entry,) = compared(both, [case])
    assert set(entry["peers"]) == {"eager"}
    assert both.results.data["absent"] == {f"broken on {case.name}": "RuntimeError: no kernel image is available"}


def test_a_peer_takes_turns_with_both_precisions_once_on_rotated_inputs():
    peer = Counting("counting")
    both = Bench(CPU, "reference", seconds=0.0, peers=[peer])
    fp8, _, bf16 = select(TINY, "quantize/tiny")
    entries = ops.run(both, [fp8, bf16], FOREVER)
    (first, one), (again, other) = peer.seen
    assert first == again == fp8.name and one != other
    assert entries[0]["peers"] == entries[1]["peers"] != {}
    assert comparable(*entries)


def test_attention_says_which_softmax_ran_and_without_a_known_bound_takes_turns_with_those_that_have_one(bench):
    entries = ops.run(bench, select(TINY, "attention-dense/tiny"), FOREVER)
    assert {entry["case"]: entry["softmax"] for entry in entries} == {
        "block_sparse_attention-dense/tiny/fp8": "running maximum",
        "block_sparse_attention-dense/tiny/int8_qk_fp8_v": "running maximum",
        "block_sparse_attention-dense/tiny/int8_qk": "bounded",
        "block_sparse_attention-dense/tiny/bf16": "bounded",
        "attention-dense/tiny/bf16": "bounded, found on the device",
    }
    assert all(comparable(entries[0], entry) for entry in entries)
    assert [set(entry["peers"]) for entry in entries] == [{"eager"}] * 4 + [set()], "eager's gate is work of its own"


def test_softmax_is_said_as_it_runs_not_as_it_should():
    known, found = (make(case, CPU) for case in select(TINY, "attention-dense/tiny/bf16"))
    assert [softmax(known | {"bound": bound}) for bound in (100.0, 100.1)] == ["bounded", "running maximum"]
    assert softmax(found | {"q": found["q"] * 30}) == "running maximum, found on the device"
    assert softmax(make(select(TINY, "quantize/tiny/bf16")[0], CPU)) is None


def test_times_of_two_spans_are_not_compared(bench):
    case = select(TINY, "quantize/tiny/bf16")[0]
    (one,), (other,) = compared(bench, [case]), compared(bench, [case])
    assert not comparable(one, other), "the chip may have been cool in one"
    before = {name: value for name, value in one.items() if name != "span"}  # results from before there were spans
    assert not comparable(before, before)
    assert "Each kernel was timed alone" in shown(before).note and "took turns" in shown(one).note


def test_a_peer_that_compiles_takes_turns_after_all_others_were_timed():
    peers = [Counting("slow a", slow=True), Counting("slow b", slow=True), Counting("quick")]
    some = Bench(CPU, "reference", seconds=0.0, peers=peers)
    SEEN.clear()
    entries = ops.run(some, select(TINY, "quantize/tiny/bf16,proj/tiny/bf16"), FOREVER)
    assert SEEN == ["quick"] * 4 + ["slow a", "slow b", "quick", "quick"] * 2
    assert all(set(entry["peers"]) == {"quick", "slow a", "slow b"} for entry in entries), "all of one span"


def test_without_a_peer_that_compiles_nothing_is_timed_again():
    def prepare(case, inputs):
        raise LookupError("no such form")

    quick = Counting("quick")
    some = Bench(CPU, "reference", seconds=0.0, peers=[quick, standing_in("absent", prepare, slow=True)])
    (group,) = groups(select(TINY, "quantize/tiny/bf16"))
    some.compare(group, [quick])
    (entry,) = some.found.values()
    assert some.compare(group, some.peers) == {} and [*some.found.values()] == [entry]


def test_a_peer_that_does_not_fit_the_time_left_is_left_out(monkeypatch):
    some = Bench(CPU, "reference", seconds=0.0, peers=[Counting("quick"), Counting("endless")])
    prepare, made = some.stopwatch.prepare, []
    monkeypatch.setattr(some.stopwatch, "prepare", lambda *a, **k: made.append(prepare(*a, **k)) or made[-1])
    monkeypatch.setattr(some.stopwatch, "least_seconds", lambda prepared: 100.0 if prepared is made[-1] else 0.0)
    (entry,) = compared(some, select(TINY, "quantize/tiny/bf16"), time.monotonic() + 60)
    assert set(entry["peers"]) == {"quick"}
    assert list(some.results.data["absent"].values()) == ["turns with it need 100 s, 60 were left"]


def test_other_implementations_are_timed_where_they_have_a_kernel(monkeypatch):
    tried = []

    def counted(case, given, backend):
        tried.append((case.op, backend))
        return call(case, given, "reference")

    monkeypatch.setattr(gates, "call", counted)
    monkeypatch.setattr(comparison, "call", counted)
    some = Bench(CPU, "triton", seconds=0.0, also=["cuda"])
    entries = ops.run(some, select(TINY, "quantize/tiny/bf16,proj/tiny/bf16"), time.monotonic() + 60)
    found = {(entry["case"].partition("-")[0].partition("/")[0], entry["impl"]) for entry in entries}
    assert found == {
        ("fp8_linear_residual", "triton"),
        ("rmsnorm_quantize", "triton"),
        ("rmsnorm_quantize", "cuda"),
    }
    assert set(tried) == found


def test_a_kernel_that_runs_out_of_memory_after_its_gate_ends_nothing(bench, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comparison, "call", full)
    (entry,) = compared(bench, select(TINY, "quantize/tiny/bf16"))
    assert (entry["verified"], entry["median_ms"], entry["reason"]) == (
        False,
        None,
        "OutOfMemoryError: CUDA out of memory",
    )


def test_every_peer_is_there_or_named_as_absent():
    usable, absent = split(PEERS, CPU)
    named = " ".join([*(p.name for p in usable), *absent]).lower()
    wanted = "eager torch.compile cudnn flash efficient flex _scaled_mm _int_mm torch.mm flashattention-4 sageattention"
    for name in wanted.split():
        assert name in named, name
    assert all(absent.values())
    assert {p.name for p in usable} >= {"eager"}


def test_importing_the_peers_imports_none_of_them():
    modules = ["flash_attn", "cudnn", "sageattention"]
    code = f"import sys; import bench.peers.registry; print(sys.modules.keys() & {modules})"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_eager_computes_the_same_thing():
    # The peer that is always there is timed against the op: it has to do the op's work.
    for case in select(TINY, "window/tiny/bf16,proj/tiny/bf16,swiglu7/tiny/bf16,gelu7/tiny/bf16,quantize/tiny/bf16"):
        given, same = make(case, CPU, 1), bf16_inputs(case, CPU, 1)
        wanted = call(case, given, "reference")[0].double()
        result = EAGER.prepare(case, same)()
        if case.op == "block_sparse_attention":
            wanted = wanted[padded_rows(case.size).token_rows()]
        elif case.op == "fp8_linear_residual":
            result = same["hidden"]
        elif isinstance(result, list):
            result = torch.cat(result)
        assert float((result.double() - wanted).norm() / wanted.norm()) < 1e-2, case.name


def test_the_state_of_the_chip_in_the_span_is_in_entry_and_table(bench):
    asked = []

    class Sampled(Monitor):
        def during(self, began, ended):
            asked.append((began, ended))
            return {"sm_mhz": 1395.0, "power_w": 699.0, "conditions": {"before": {}, "after": {}}}

    case = select(TINY, "quantize/tiny/bf16")[0]
    assert not {"sm_mhz", "power_w"} & compared(bench, [case])[0].keys()
    bench.monitor, began = Sampled(CPU), time.monotonic()
    (entry,) = compared(bench, [case])
    (span,) = asked
    assert began < span[0] < span[1] < time.monotonic()
    assert (entry["sm_mhz"], entry["power_w"]) == (1395.0, 699.0)
    line = dict(zip(shown(entry, bench).columns, shown(entry, bench).rows[0], strict=True))
    assert line["of the measured ceiling"].endswith("%") and (line["MHz"], line["W"]) == ("1395", "699")
    assert float(line["of roofline"]) == pytest.approx(entry["roofline"], rel=1e-3)


def test_time_that_is_up_starts_nothing(bench, capsys):
    assert ops.run(bench, TINY, time.monotonic() - 1) == []
    assert "time is up" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "code"), [(["--gates"], 1), ([], 0)])
def test_gates_that_were_not_reached_are_no_green_ones(more, code):
    asked = ["--device", "cpu", "--scope", "tiny", "--cases", "proj/tiny/fp8", "--minutes", "0", "--seconds", "0"]
    assert ops.main([*asked, "--peers", "none", *more]) == code
