"""Result files: the format, round trips, a cut run, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest

from bench.cases import cases
from bench.results import ResultError, Results, differences, merged, path_for, read, validate

HEADER = {"gpu": "NVIDIA H200", "driver": "580.95", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}
ENTRY = {
    "case": "qkv_linear/1080p-5s/fp8",
    "impl": "triton",
    "median_ms": 4.5,
    "tflops": 1066.0,
    "gbps": 300.0,
    "roofline": 0.54,
    "peers": {"eager": 9.0},
    "verified": True,
}
RED = (
    ENTRY
    | dict.fromkeys(("median_ms", "tflops", "gbps", "roofline"))
    | {"verified": False, "reason": "NaN", "peers": {}}
)
RUN = {
    "preset": "happyhorse-1.0-15b",
    "resolution": "1080p",
    "seconds": 5,
    "mode": "fast fp8",
    "steps": 8,
    "s_per_step": 3.4,
    "total_s": 27.2,
    "peak_memory_gib": 18.5,
    "mask": "exact",
    "cap_gb": None,
    "note": "",
}


def test_files_round_trip_entry_by_entry(tmp_path):
    path = path_for(HEADER, tmp_path)
    assert path.parent.name == "nvidia-h200" and path.name.endswith("-abc1234.json")
    results = Results(path, HEADER)
    results.add("entries", ENTRY)
    assert read(path)["entries"] == [ENTRY], "written as it is made"
    results.add("sampler", RUN)
    results.add_absent({"sageattention": "sageattention is not installed"})
    data = read(path)
    assert {k: data[k] for k in HEADER} == HEADER
    assert data["sampler"] == [RUN] and data["absent"] == {"sageattention": "sageattention is not installed"}
    assert list(path.parent.glob("*.partial")) == []


def test_a_run_that_goes_on_replaces_entries_of_the_same_name(tmp_path):
    path = tmp_path / "r.json"
    Results(path, HEADER).add("entries", ENTRY)
    again = Results(path, HEADER)
    again.add("entries", ENTRY | {"median_ms": 4.0})
    again.add("entries", ENTRY | {"case": "other"})
    assert [(e["case"], e["median_ms"]) for e in read(path)["entries"]] == [(ENTRY["case"], 4.0), ("other", 4.5)]
    again.add("sampler", RUN)
    again.add("sampler", RUN | {"cap_gb": 24})
    assert len(read(path)["sampler"]) == 2


def test_runs_of_two_backends_are_both_kept_and_told_apart(tmp_path):
    eager = {name: value for name, value in RUN.items() if name != "attention"} | {"mode": "eager"}
    fast = [RUN | {"backend": backend, "attention": backend} for backend in ("hopper", "triton")]
    for run in (eager, *fast, fast[1] | {"total_s": 30.0}):
        Results(tmp_path / "r.json", HEADER).add("sampler", run)
    data = read(tmp_path / "r.json")
    assert [(run.get("backend"), run["total_s"]) for run in data["sampler"]] == [
        (None, 27.2),
        ("hopper", 27.2),
        ("triton", 30.0),
    ]
    # "auto" took one kernel at one commit and another at the next: neither replaces the other.
    auto = [data | {"sampler": [RUN | {"backend": "auto", "attention": kernel}]} for kernel in ("triton", "hopper")]
    assert [run["attention"] for run in merged(auto)["sampler"]] == ["triton", "hopper"]
    again = auto[1] | {"sampler": [auto[1]["sampler"][0] | {"total_s": 26.0}]}
    assert [run["total_s"] for run in merged([*auto, again])["sampler"]] == [27.2, 26.0]


def test_another_machines_file_is_not_continued(tmp_path):
    Results(tmp_path / "r.json", HEADER).add("entries", ENTRY)
    with pytest.raises(ResultError, match=r"gpu is 'NVIDIA H200', this run's is 'NVIDIA A100'"):
        Results(tmp_path / "r.json", HEADER | {"gpu": "NVIDIA A100"})


def test_a_run_on_the_next_machine_goes_on_in_the_same_file(tmp_path):
    # Drivers of one branch, another day: one file; another branch or torch: a file of its own.
    first = path_for(HEADER, tmp_path)
    yesterday = first.with_name("2020-01-01-abc1234.json")
    Results(yesterday, HEADER).add("entries", ENTRY)
    patched = HEADER | {"driver": "580.95.05", "capability": "90"}
    assert path_for(patched, tmp_path) == yesterday
    Results(yesterday, patched).add("entries", ENTRY | {"case": "other"})
    data = read(yesterday)
    assert (data["driver"], data["capability"], len(data["entries"])) == ("580.95, 580.95.05", "90", 2)
    assert path_for(patched, tmp_path) == yesterday and not differences(data, HEADER)
    for changed in ({"driver": "590.1"}, {"torch": "2.12.0"}):
        assert path_for(HEADER | changed, tmp_path).name == f"{first.stem}-2.json"


def test_a_refused_entry_leaves_the_file_as_it_was(tmp_path):
    results = Results(tmp_path / "r.json", HEADER)
    results.add("entries", ENTRY)
    with pytest.raises(ResultError):
        results.add("entries", ENTRY | {"case": "other", "median_ms": float("nan")})
    assert read(tmp_path / "r.json")["entries"] == [ENTRY]


def whole(**changes):
    return {**HEADER, "entries": [copy.deepcopy(ENTRY)], "sampler": [copy.deepcopy(RUN)], **changes}


def test_files_from_before_there_were_spans_still_load(tmp_path):
    assert not {"span", "sm_mhz", "power_w", "roofline_measured"} & ENTRY.keys() and "gates" not in whole()
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole()))
    results = Results(path, HEADER)
    newer = ENTRY | {"span": "0123456789ab", "sm_mhz": 1395.0, "power_w": 699.0, "roofline_measured": 0.9}
    results.add("entries", newer)
    results.add("sampler", RUN | {"sm_mhz": 1395.0, "power_w": 699.0})
    results.add("gates", {"case": cases("tiny")[0].name, "impl": "triton", "passed": True})
    assert read(path)["entries"] == [newer] and read(path)["gates"][0]["passed"] is True
    with pytest.raises(ResultError, match=r"gates\[0\]: passed must be bool"):
        validate(whole(gates=[{"case": "a", "impl": "triton", "passed": "yes"}]), "here")


def test_red_cases_and_memory_that_ran_out_are_results():
    out_of_memory = RUN | dict.fromkeys(("s_per_step", "total_s", "peak_memory_gib")) | {"note": "out of memory"}
    validate(whole(entries=[RED], sampler=[out_of_memory]), "here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be an object"),
        (whole(gpu=5), "gpu must be str, got 5"),
        (whole(speed=1), "speed is not part of the format"),
        ({k: v for k, v in whole().items() if k != "driver"}, "driver is missing"),
        (whole(entries=[{k: v for k, v in ENTRY.items() if k != "roofline"}]), r"entries\[0\]: roofline is missing"),
        (whole(entries=[ENTRY | {"median_ms": "4"}]), "must be a finite number"),
        (whole(entries=[ENTRY | {"median_ms": float("inf")}]), "must be a finite number"),
        (whole(entries=[ENTRY | {"median_ms": -1}]), "must be a finite number"),
        (whole(entries=[ENTRY | {"verified": False}]), "not verified, so it must have no number"),
        (whole(entries=[ENTRY | {"median_ms": None}]), "neither a time nor a reason"),
        (whole(entries=[ENTRY | {"peers": {"eager": None}}]), "peers"),
        (whole(sampler=[RUN | {"seconds": 5.5}]), "seconds must be int"),
        (whole(sampler=[RUN | {"steps": True}]), "steps must be int"),
    ],
)
def test_what_is_not_the_format_is_refused(data, message):
    with pytest.raises(ResultError, match=message):
        validate(data, "here")


def test_a_cut_file_is_refused_by_name(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole())[:100])
    with pytest.raises(ResultError, match=r"r.json: not JSON"):
        read(path)
