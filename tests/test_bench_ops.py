"""The gate and the table: a wrong kernel has no number, a slow one shows, a broken peer ends nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import eager, gates, ops
from bench.bootstrap import ROOT
from bench.cases import cases, padded_rows, select
from bench.inputs import call, make
from bench.peers import Eager, Peer, all_peers, split
from bench.results import Results, describe_machine, read
from bench.timing import Stopwatch

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
    assert "NOT VERIFIED" in ops.table([entry])
    assert not any(character.isdigit() for cell in ops.row(entry)[1:7] for character in cell)
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
    bench.add_peers(honest, case, slow=False)

    def slow(*arguments):
        time.sleep(0.5)
        return call(*arguments)

    monkeypatch.setattr(ops, "call", slow)
    entry = bench.entry(case)
    bench.add_peers(entry, case, slow=False)
    assert entry["verified"] and entry["median_ms"] > 500 > honest["median_ms"]
    assert entry["peers"]["eager"] / entry["median_ms"] < 0.5, "the peer is more than twice as fast"
    assert entry["roofline"] < honest["roofline"]
    assert "eager 0.0" in ops.table([entry])


def test_a_peer_that_breaks_is_named_and_ends_nothing(bench):
    class Broken(Eager):
        name = "broken"

        def prepare(self, case, inputs):
            raise RuntimeError("no kernel image is available")

    entry = bench.entry(TINY[8])
    both = ops.Bench(CPU, "reference", seconds=0.0, peers=[Broken(), Eager()])
    both.add_peers(entry, TINY[8], slow=False)
    assert set(entry["peers"]) == {"eager"}
    assert both.absent == {f"broken on {TINY[8].name}": "RuntimeError: no kernel image is available"}


def test_every_peer_of_the_issue_is_there_or_named_as_absent():
    usable, absent = split(all_peers(), CPU)
    named = " ".join([*(p.name for p in usable), *absent]).lower()
    wanted = "eager torch.compile cudnn flash_attention efficient flex _scaled_mm torchao flashattention-3 flashinfer"
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


def test_a_stopwatch_tells_a_slow_call_from_a_fast_one():
    watch = Stopwatch(CPU)
    fast = watch.time([lambda: None], seconds=0.01)
    slow = watch.time([lambda: time.sleep(0.02)], seconds=0.1)
    assert fast.median_ms < 20 <= slow.median_ms
    assert slow.low_ms <= slow.median_ms <= slow.high_ms
    assert slow.repeats >= 3
    assert isinstance(Eager(), Peer)


def test_time_that_is_up_starts_nothing(bench, capsys):
    assert ops.run(bench, TINY, None, time.monotonic() - 1) == []
    assert "time is up" in capsys.readouterr().err
