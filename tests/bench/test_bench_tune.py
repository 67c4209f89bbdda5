"""Tuning: legal candidates, gates, and a table that is written only where one wins."""

from __future__ import annotations

import dataclasses
import json
import time

import interpreter  # noqa: F401  (exact arithmetic)
import pytest
import torch
from simulated_gpu import Gpu, install

from bench import tune
from bench.cases import cases, select
from bench.measure.timing import Prepared, Stopwatch
from happyhorse_fast.kernels.launch import LaunchConfig, config_for, illegal, launched_with, table
from happyhorse_fast.ops.runtime.dispatch import STEMS

CPU = torch.device("cpu")


def takes(monkeypatch, ms):
    """Let a configuration take so long, whatever it does."""
    monkeypatch.setattr(tune, "prepare", lambda t, a, config, *_, **__: Prepared([], "cpu", ms(config)))
    monkeypatch.setattr(tune, "beaten", lambda best, other, *_: (other.about_ms < best.about_ms, ""))


TUNED = [case for case in cases("main") if tune.variant(case)]


@pytest.mark.parametrize("case", TUNED, ids=lambda case: case.kind)
def test_every_candidate_is_legal_and_the_committed_one_is_first(case):
    found = tune.candidates(case, 90)
    assert found[0] == LaunchConfig(**table(STEMS[case.op])[tune.variant(case)]["90"])
    assert len(found) > 1 and len(set(found)) == len(found)
    for config in found:
        shared = tune._shared(case, config)
        assert illegal(config, 90, fp8=case.precision == "fp8", shared_bytes=shared) is None


def test_tuning_restores_the_table_and_writes_what_wins(tmp_path, monkeypatch):
    case = select(cases("tiny"), "proj/tiny/fp8")[0]
    stem, variant = STEMS[case.op], tune.variant(case)
    before = json.dumps(table(stem))
    # The interpreter's times mean nothing: warps decide here.
    takes(monkeypatch, lambda config: 1.0 if config.num_warps == 4 else 2.0)
    best = tune.tune(case, 89, Stopwatch(CPU), 0.0, time.monotonic() + 60)
    assert best is not None and best.num_warps == 4
    with launched_with(stem, {(variant, 89): best}):
        assert config_for(stem, variant, 89).num_warps == 4
    assert config_for(stem, variant, 89).num_warps != 4
    assert json.dumps(table(stem)) == before
    path = tune.write(tmp_path, case, 89, best)
    written, committed = json.loads(path.read_text()), json.loads((tune.CONFIGS / path.name).read_text())
    changed = written[variant].pop("89") != committed[variant].pop("89")
    assert changed and written == committed
    lines = (tune.CONFIGS / path.name).read_text().splitlines()
    assert sum(a != b for a, b in zip(path.read_text().splitlines(), lines, strict=True)) == 1, "one line changes"


@pytest.mark.parametrize("words", ["attention-window", "residual-down/1080p-5s/fp8", "qkv_linear/1080p-5s/fp8"])
def test_hopper_warps_are_a_candidate_and_are_written(tmp_path, words):
    case = select(cases("main"), words)[0]
    variant = tune.variant(case)
    hopper, plain, *others = tune.candidates(case, 90)
    assert hopper == dataclasses.replace(plain, hopper=True)
    assert others and not any(config.hopper for config in others), "the Hopper kernel has its own entry"
    assert not any(config.hopper for config in tune.candidates(case, 89))
    written = json.loads(tune.write(tmp_path, case, 90, hopper).read_text())
    assert LaunchConfig(**written[variant]["90"]) == hopper
    written = json.loads(tune.write(tmp_path, case, 90, plain).read_text())
    assert LaunchConfig(**written[variant]["90"]) == plain


def test_groups_of_rows_are_varied_for_the_best_alone(monkeypatch):
    case = select(cases("main"), "down/1080p-5s/fp8")[0]
    timed = []

    def taken(config):
        timed.append(config)
        return 1.0 if config.num_stages == 5 and config.group_m == 32 else 1.5 if config.num_stages == 5 else 2.0

    takes(monkeypatch, taken)
    best = tune.tune(case, 90, Stopwatch(CPU), 0.0, time.monotonic() + 60)
    committed = timed[0].group_m
    assert best.num_stages == 5 and best.group_m == (32 if committed != 32 else committed)
    assert len({config.group_m for config in timed[:-2]}) == 1 and len(timed) < 3 * len(timed[:-2])


def test_a_candidate_that_takes_the_gpu_stops_the_tuner(monkeypatch):
    case = next(case for case in cases("tiny") if tune.variant(case))
    monkeypatch.setattr(tune, "prepare", lambda *_, **__: "AcceleratorError: CUDA error: an illegal memory access")
    monkeypatch.setattr(tune, "lost", lambda device: "CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="lost after"):
        tune.tune(case, 89, Stopwatch(CPU), 0.0, time.monotonic() + 60)


def test_a_candidate_that_is_wrong_or_does_not_compile_does_not_count(monkeypatch):
    case = next(case for case in cases("tiny") if tune.variant(case))
    config = tune.candidates(case, 89)[0]
    monkeypatch.setattr(tune, "problems", lambda *_: ["out: worst tile distance 1"])
    assert "gate" in str(tune.prepare(case, 89, config, Stopwatch(CPU), dry=True))

    def broken(*_):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(tune, "problems", broken)
    assert "out of resource" in str(tune.prepare(case, 89, config, Stopwatch(CPU), dry=True))


def test_a_candidate_that_only_met_another_chip_does_not_win(monkeypatch):
    # The same work beside the committed one's, on a chip that slows down by a fifth as it warms.
    gpu = install(monkeypatch, Gpu(slower=0.2))
    watch = gpu.stopwatch()

    def taking(work_ms):
        return Prepared([lambda: gpu.launch("call", 0.01, work_ms)], "events", work_ms)

    assert not tune.beaten(taking(6.0), taking(6.0), watch, 0.1)[0]
    assert not tune.beaten(taking(6.0), taking(5.95), watch, 0.1)[0], "within the noise"
    won, said = tune.beaten(taking(6.0), taking(5.5), watch, 0.1)
    assert won and said.count("beside") == 2, "once more, warm"
