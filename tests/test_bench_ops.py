"""The gate and the table: a wrong kernel has no number, a slow one shows, a broken peer ends nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import conditions, eager, gates, ops, ops_table
from bench.bootstrap import ROOT
from bench.cases import cases, padded_rows, select
from bench.inputs import call, make
from bench.lost import lost
from bench.peers import Eager, all_peers, split
from bench.results import Results, describe_machine, read
from bench.specialized import GLUON, STEM, running
from happyhorse_fast.kernels.launch import table

CPU = torch.device("cpu")
TINY = cases("tiny")


@pytest.fixture(scope="module")
def bench():
    return ops.Bench(CPU, "reference", seconds=0.0, peers=[Eager()])


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


@pytest.mark.parametrize(
    "name", ["window/tiny", "swiglu7/tiny", "down/tiny", "qkv_linear/tiny/bf16", "quantize/tiny/bf16"]
)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_has_no_number(name, what, bench, monkeypatch, tmp_path):
    case = select(TINY, name)[-1]
    planted(monkeypatch, WRONG[what])
    results = Results(tmp_path / "r.json", describe_machine(CPU))
    (entry,) = ops.run(bench, [case], results, time.monotonic() + 60)
    assert entry["verified"] is False
    assert entry["reason"]
    assert [entry[k] for k in ("median_ms", "tflops", "gbps", "roofline", "peers")] == [None, None, None, None, {}]
    assert "NOT VERIFIED" in ops_table.table([entry])
    assert not any(character.isdigit() for cell in ops_table.row(entry)[2:8] for character in cell)
    (written,) = read(tmp_path / "r.json")["entries"]
    assert written == json.loads(json.dumps(entry))


def test_a_kernel_that_raises_has_no_number(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gates, "call", broken)
    entry = bench.entry(TINY[0])
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
    honest = bench.entry(case)
    bench.add_peers([honest], case, bench.peers)

    def slow(*arguments):
        time.sleep(0.5)
        return call(*arguments)

    monkeypatch.setattr(ops, "call", slow)
    entry = bench.entry(case)
    bench.add_peers([entry], case, bench.peers)
    assert entry["verified"] and entry["median_ms"] > 500 > honest["median_ms"]
    assert entry["peers"]["eager"] / entry["median_ms"] < 0.5, "the peer is more than twice as fast"
    assert entry["roofline"] < honest["roofline"]
    assert "eager 0.0" in ops_table.table([entry])


def test_a_peer_that_breaks_is_named_and_ends_nothing(bench):
    class Broken(Eager):
        name = "broken"

        def prepare(self, case, inputs):
            raise RuntimeError("no kernel image is available")

    entry = bench.entry(TINY[8])
    both = ops.Bench(CPU, "reference", seconds=0.0, peers=[Broken(), Eager()])
    both.add_peers([entry], TINY[8], both.peers)
    assert set(entry["peers"]) == {"eager"}
    assert both.absent == {f"broken on {TINY[8].name}": "RuntimeError: no kernel image is available"}


class Counting(Eager):
    """Eager PyTorch that tells what it was prepared for."""

    def __init__(self, name, slow=False):
        self.name, self.slow, self.seen = name, slow, []

    def prepare(self, case, inputs):
        self.seen.append((case.name, inputs.seed))
        SEEN.append(self.name)
        return super().prepare(case, inputs)


SEEN: list[str] = []


def test_a_peer_is_timed_once_for_both_precisions_on_rotated_inputs():
    peer = Counting("counting")
    both = ops.Bench(CPU, "reference", seconds=0.0, peers=[peer])
    fp8, bf16 = select(TINY, "quantize/tiny")
    entries = ops.run(both, [fp8, bf16], None, time.monotonic() + 60)
    assert peer.seen == [(fp8.name, 0), (fp8.name, 1)]
    assert entries[0]["peers"] == entries[1]["peers"] != {}


def test_a_peer_that_compiles_runs_after_all_others_and_for_all_cases_before_the_next():
    peers = [Counting("last a", slow=True), Counting("last b", slow=True), Counting("quick")]
    some = ops.Bench(CPU, "reference", seconds=0.0, peers=peers)
    SEEN.clear()
    entries = ops.run(some, select(TINY, "quantize/tiny/bf16,proj/tiny/bf16"), None, time.monotonic() + 60)
    assert SEEN == ["quick"] * 4 + ["last a"] * 2 + ["last b"] * 2
    assert all(set(entry["peers"]) == {"quick", "last a", "last b"} for entry in entries)


def test_other_implementations_are_timed_where_they_have_a_kernel(monkeypatch):
    tried = []

    def counted(case, given, backend):
        tried.append((case.op, backend))
        return call(case, given, "reference")

    monkeypatch.setattr(gates, "call", counted)
    monkeypatch.setattr(ops, "call", counted)
    some = ops.Bench(CPU, "triton", seconds=0.0, also=["cuda"])
    entries = ops.run(some, select(TINY, "quantize/tiny/bf16,proj/tiny/bf16"), None, time.monotonic() + 60)
    found = {(entry["case"].partition("-")[0].partition("/")[0], entry["impl"]) for entry in entries}
    assert found == {
        ("fp8_linear_residual", "triton"),
        ("rmsnorm_quantize", "triton"),
        ("rmsnorm_quantize", "cuda"),
    }
    assert set(tried) == found


def test_specialized_warps_are_an_implementation_of_their_own_whatever_the_table_says():
    before = json.dumps(table(STEM))
    with running(GLUON) as backend:
        inside = table(STEM)
        assert backend == "triton"
        assert inside["bf16_d128"]["90"]["specialized"] and not inside["bf16_d128"]["80"].get("specialized")
        assert not inside["bf16_d128_strided"]["90"].get("specialized")
    with running("triton"):
        assert not any(entry.get("specialized") for entry in (table(STEM)[f"{f}_d128"]["90"] for f in ("bf16", "fp8")))
    with running("auto"):
        assert table(STEM)["bf16_d128"]["90"]["specialized"], "what is committed"
    assert json.dumps(table(STEM)) == before
    attention, norm = select(TINY, "window/tiny/bf16,quantize/tiny/bf16")
    assert ops.implementations(attention, "triton", [GLUON, "cuda"]) == ["triton", GLUON, "cuda"]
    assert ops.implementations(norm, "triton", [GLUON, "cuda"]) == ["triton", "cuda"]
    assert ops.other_backends(CPU)[1][GLUON] == "needs a GPU"


def test_a_kernel_that_runs_out_of_memory_after_its_gate_ends_nothing(bench, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "call", full)
    entry = bench.entry(select(TINY, "quantize/tiny/bf16")[0])
    assert (entry["verified"], entry["median_ms"], entry["reason"]) == (
        False,
        None,
        "OutOfMemoryError: CUDA out of memory",
    )


def test_every_peer_of_the_issue_is_there_or_named_as_absent():
    usable, absent = split(all_peers(), CPU)
    named = " ".join([*(p.name for p in usable), *absent]).lower()
    wanted = "eager torch.compile cudnn flash efficient flex _scaled_mm torchao flashattention-3 flashinfer torch.mm"
    for name in f"{wanted} sageattention quack magiattention liger-kernel".split():
        assert name in named, name
    assert all(absent.values())
    assert {p.name for p in usable} >= {"eager"}


def test_importing_the_peers_imports_none_of_them():
    modules = ["torchao", "flash_attn_interface", "flashinfer", "sageattention", "quack", "magi_attention"]
    code = f"import sys; from bench.peers import all_peers; list(all_peers()); print(sys.modules.keys() & {modules})"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_eager_computes_the_same_thing():
    # The peer that is always there is timed against the op: it has to do the op's work.
    for case in select(TINY, "window/tiny/bf16,proj/tiny/bf16,swiglu7/tiny/bf16,gelu7/tiny/bf16,quantize/tiny/bf16"):
        given, same = make(case, CPU, 1), make(case, CPU, 1)
        wanted = call(case, given, "reference")[0].double()
        result = eager.prepare(case, same)()
        if case.op == "block_sparse_attention":
            wanted = wanted[padded_rows(case.size).token_rows()]
        elif case.op == "fp8_linear_residual":
            result = same["hidden"]
        elif isinstance(result, list):
            result = torch.cat(result)
        assert float((result.double() - wanted).norm() / wanted.norm()) < 1e-2, case.name


# A CUDA error that nothing survives -----------------------------------------------------------------------------------


class Gpu:
    """Stands for a device that an illegal address takes from this process; what is written is read at that moment."""

    def __init__(self, monkeypatch, path):
        self.error, self.results = None, Results(path, describe_machine(CPU))
        monkeypatch.setattr(ops, "lost", lambda device: self.error)

    def crash(self):
        self.error = "AcceleratorError: CUDA error: an illegal memory access was encountered"
        raise RuntimeError(self.error)

    @property
    def written(self):
        return {entry["case"]: entry["verified"] for entry in read(self.results.path)["entries"]}


def test_a_lost_gpu_stops_the_run_at_the_case_that_lost_it(bench, monkeypatch, tmp_path, capsys):
    gpu = Gpu(monkeypatch, tmp_path / "r.json")
    first, second, third = select(TINY, "quantize/tiny,proj/tiny/bf16")
    monkeypatch.setattr(gates, "call", lambda case, *rest: gpu.crash() if case == second else call(case, *rest))
    ops.run(bench, [first, second, third], gpu.results, time.monotonic() + 60)
    assert gpu.written == {first.name: True, second.name: False}, "the third is not blamed"
    assert "STOPPED" in capsys.readouterr().err


def test_a_number_is_written_before_a_peer_can_take_the_gpu(monkeypatch, tmp_path):
    gpu, case = Gpu(monkeypatch, tmp_path / "r.json"), select(TINY, "quantize/tiny/bf16")[0]

    class Crashing(Eager):
        name = "crashing"

        def prepare(self, case, inputs):
            assert gpu.written == {case.name: True}
            gpu.crash()

    some = ops.Bench(CPU, "reference", seconds=0.0, peers=[Crashing()])
    ops.run(some, [case, *select(TINY, "proj/tiny/bf16")], gpu.results, time.monotonic() + 60)
    assert gpu.written == {case.name: True}
    # Started again, it keeps what is there and does not try that peer again.
    gpu.error = None
    again = ops.Bench(CPU, "reference", 0.0, [Crashing()], known=gpu.results.data, keep="all")
    monkeypatch.setattr(again, "entry", lambda case, impl: ops.red(case, impl, ["timed"]))
    entries = ops.run(again, [case, *select(TINY, "proj/tiny/bf16")], gpu.results, time.monotonic() + 60)
    assert [entry.get("reason") for entry in entries] == [None, "timed"]


def test_the_other_implementation_takes_over_its_peers_times(bench, tmp_path):
    case, peer = select(TINY, "quantize/tiny/bf16")[0], Counting("counting")
    results = Results(tmp_path / "r.json", describe_machine(CPU))
    ops.run(ops.Bench(CPU, "reference", 0.0, [Counting("counting")]), [case], results, time.monotonic() + 60)
    (first,) = results.data["entries"]
    other = ops.Bench(CPU, "reference", 0.0, [peer], known=results.data, keep="peers")
    (entry,) = ops.run(other, [case], results, time.monotonic() + 60)
    assert entry is not first and entry["peers"] == first["peers"] and peer.seen == []


def test_what_a_lost_gpu_says(monkeypatch):
    def poisoned(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "synchronize", poisoned)
    assert lost(torch.device("cuda")) == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert lost(CPU) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert lost(torch.device("cuda")) is None


def test_ours_is_timed_before_its_peers_and_after_them(monkeypatch):
    order = []

    class Noted(Counting):
        def prepare(self, case, inputs):
            order.append("peer")
            return super().prepare(case, inputs)

    case = select(TINY, "quantize/tiny/bf16")[0]
    some = ops.Bench(CPU, "reference", seconds=0.01, peers=[Noted("counting")])
    timing = some.timing
    monkeypatch.setattr(some, "timing", lambda *given: (order.append("ours"), timing(*given))[1])
    (entry,) = ops.run(some, [case], None, time.monotonic() + 60)
    assert order == ["ours", "peer", "peer", "ours"] and entry["peers"]


def test_the_state_of_the_chip_is_recorded(bench, monkeypatch):
    answers = iter(["1980, 2619, 120.5, 41, 0x0000000000000001", "1755, 2619, 700.1, 66, 0x0000000000000004"])
    monkeypatch.setattr(conditions, "_known_fields", lambda: tuple(conditions.FIELDS))
    monkeypatch.setattr(conditions.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(
        conditions.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, next(answers), "")
    )
    gpu = torch.device("cuda:0")
    found = conditions.around(conditions.read(gpu), gpu)["conditions"]
    assert found["before"]["sm_mhz"] == 1980 and found["after"]["power_w"] == 700.1
    assert found["after"]["throttle"].endswith("4")
    assert conditions.around({}, CPU) == {}


def test_time_that_is_up_starts_nothing(bench, capsys):
    assert ops.run(bench, TINY, None, time.monotonic() - 1) == []
    assert "time is up" in capsys.readouterr().err
