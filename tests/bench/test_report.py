"""The report: its pages are what the committed results make; a slow and a wrong kernel show as such."""

from __future__ import annotations

import base64
import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import targets
from bench.cases import cases
from bench.report import __main__ as report
from bench.report import data as report_data
from bench.report import figures as report_figures
from bench.report import measure as report_measure
from bench.report import pony as report_pony
from bench.report import tables as report_tables
from bench.results import HEADER, ResultError, Results, read
from happyhorse_fast.costs import cards_for
from happyhorse_fast.pony.weights import weights_digest
from happyhorse_fast.verify import fidelity

MOST_BYTES = 200_000
ATTENTION, NORM, GOOD, SLOW, WRONG = (
    f"{use}/1080p-5s/{precision}"
    for use, precision in (
        ("attention-dense", "bf16"),
        ("rmsnorm_quantize", "bf16"),
        ("qkv_linear", "bf16"),
        ("quantize_rows-down", "int8"),
        ("qkv_linear", "fp8"),
    )
)
ENTRY = {
    "impl": "triton",
    "median_ms": 2.0,
    "tflops": 612.3,
    "gbps": 1843.0,
    "roofline": 0.62,
    "peers": {"sdpa-cudnn": 3.0, "flex": 5.0},
    "verified": True,
}
RUN = {
    "preset": "happyhorse-1.0-15b",
    "resolution": "1080p",
    "seconds": 5,
    "mode": "fast fp8",
    "steps": 8,
    "s_per_step": 3.51,
    "total_s": 28.1,
    "peak_memory_gib": 17.9,
}


def results(folder: Path, *entries: dict[str, Any], sampler: tuple[dict[str, Any], ...] = ()) -> report_data.Report:
    """The committed results with a GPU's file in place of theirs."""
    header = {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11", "triton": "3.6.0", "commit": "abcdef"}
    file = folder / "nvidia-h200" / "2026-01-02-abcdef.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**header, "entries": [{**ENTRY, **e} for e in entries], "sampler": list(sampler)}))
    return report_data.load(folder)


def text_of(found: report_data.Report) -> str:
    return report.readme_section(found) + report.page_section(found)


def test_readmes_are_what_the_committed_results_make() -> None:
    found = report_data.load()
    for path, section in report.sections(found).items():
        readme = path.read_text(encoding="utf-8")
        assert readme == report.with_section(readme, section), f"{path} is stale: run `python -m bench.report --readme`"


def test_results_of_the_pony_are_of_the_weights_in_the_package() -> None:
    found = report_data.load()
    assert len(found.rates) == 2
    for data in (found.fidelity, found.calibration, *found.rates):
        stale = "measured on other weights: run `python -m bench.report.measure pony`, then `make report`"
        assert data["weights"] == weights_digest(), stale
    measured = [(result["kind"], result["name"]) for result in found.fidelity["results"]]
    assert measured == [(policy.kind, policy.name) for policy in fidelity.policies()]
    assert list(fidelity.violations(as_fidelity(found.fidelity))) == []


def as_fidelity(data: dict[str, Any]) -> fidelity.Fidelity:
    results = tuple(
        fidelity.PolicyResult(r["name"], r["kind"], r["settings"], r["kept"], fidelity.Summary(**r["summary"]), ())
        for r in data["results"]
    )
    return fidelity.Fidelity(data["weights"], data["steps"], data["right"], data["clips"], results)


def test_what_the_pony_lost_is_shown() -> None:
    found = report_data.load()
    planted = copy.deepcopy(found.fidelity)
    planted["results"][0]["summary"] |= {"psnr_db": [2.34, 1.11], "moved": 5, "right": 3}
    shown = dataclasses.replace(found, fidelity=planted, rates=[{**found.rates[0], "failed": []}])
    text = report_pony.own_section(shown)
    assert "2.3/1.1" in text and "Nothing was wrong." in text and "qkv alone" in text
    of_ops = {"kind": "int8 op", "name": "qkv alone"}, {"kind": "int8", "name": "all, attention int8_qk"}
    planted["results"] += [copy.deepcopy(planted["results"][1]) | names for names in of_ops]
    planted["results"][-1]["summary"] |= {"psnr_db": [57.89, 41.23]}
    short = report.readme_section(shown)
    assert "| int8: all, attention int8_qk | 57.9/41.2 |" in short and "int8: qkv alone" not in short
    assert "examples/pony/README.md" in short and "Nothing was wrong." in short and "2.3/1.1" not in short
    figures = report_pony.figures(shown)
    worst = min(x for line in figures["fidelity"].axes[0].lines for x in line.get_xdata())
    assert worst == 2.34


def test_committed_pictures_are_small_and_those_of_the_report_are_drawn_and_shown() -> None:
    pictures, found = sorted(report.OUT.glob("*.png")), report_data.load()
    assert {p.stem for p in pictures} == report_figures.figures(found).keys() | report_pony.figures(found).keys()
    shown = " ".join(path.read_text(encoding="utf-8") for path in report.sections(found))
    assert [p.name for p in pictures if f"{p.name})" not in shown] == []
    pictures += report.PONY_README.parent.rglob("*.png")
    assert [p.name for p in pictures if p.stat().st_size >= MOST_BYTES] == []


def test_one_page_holds_all_tables_and_pictures() -> None:
    page = report.html()
    shown = set(re.findall(r'src="([^"]*)"', page))
    embedded = {base64.b64encode(path.read_bytes()).decode() for path in report.OUT.glob("*.png")}
    assert {f"data:image/png;base64,{data}" for data in embedded} <= shown
    assert all(source.startswith("data:image/png;base64,") for source in shown)
    sources = [path.read_text(encoding="utf-8") for path in (report.README, report.PONY_README)]
    sources = [text.partition(report.BEGIN)[2].partition(report.END)[0] for text in sources]
    tables = "".join([*sources, report.PAGE.read_text(encoding="utf-8")]).count("\n|---")
    assert page.count("<table>") == page.count("</table>") == tables > 5


def test_a_faster_kernel_is_compared_with_its_best_peer(tmp_path: Path) -> None:
    found = results(tmp_path, {"case": ATTENTION}, sampler=(RUN,))
    text = text_of(found)
    for shown in ("612", "sdpa-cudnn 3 (1.50x)", "28.1", "17.9", "NVIDIA H200"):
        assert shown in text
    assert "SLOWER" not in text


def test_calls_and_days_of_one_gpu_are_shown_together(tmp_path: Path) -> None:
    found = results(tmp_path, {"case": ATTENTION}, {"case": NORM}, sampler=(RUN,))
    (path,) = found.gpu
    later = json.loads(path.read_text()) | {"commit": "fedcba", "sampler": []}
    later["entries"] = [{**ENTRY, "case": NORM, "median_ms": 1.0}]
    path.with_name("2026-01-03-fedcba.json").write_text(json.dumps(later))
    found = report_data.load(tmp_path)
    (data,) = found.gpu.values()
    assert {e["case"]: e["median_ms"] for e in data["entries"]} == {ATTENTION: 2.0, NORM: 1.0}
    assert data["sampler"] == [RUN] and data["commit"] == "abcdef, fedcba"
    assert "| attention-dense/bf16 |" in report.readme_section(found)


def test_a_case_that_is_no_longer_run_is_not_shown_and_stays_in_its_file(tmp_path: Path) -> None:
    gone = "rmsnorm_qkv/1080p-5s/bf16"
    found = results(tmp_path, {"case": gone}, {"case": GOOD})
    section = report.readme_section(found)
    assert "rmsnorm_qkv" not in section and "1 of 1 pairs of op and kernel passed" in section
    assert [row[0] for row in report_tables.ops_table(found.newest[1]).rows] == ["qkv_linear/bf16"]
    ((path, data),) = found.gpu.items()
    Results(path, {name: data[name] for name in HEADER}).add("entries", ENTRY | {"case": NORM})
    assert [entry["case"] for entry in read(path)["entries"]] == [gone, GOOD, NORM]
    there = {"cuda": "no GPU", "eager on block_sparse_attention-25%": "it has none"}
    path.write_text(json.dumps(read(path) | {"absent": there | {"flashinfer dense bf16 (no gate)": "not installed"}}))
    assert report_data.load(tmp_path).newest[1]["absent"] == there


def test_a_planted_slow_kernel_is_told(tmp_path: Path) -> None:
    found = results(tmp_path, {"case": GOOD}, {"case": SLOW, "median_ms": 4.0})
    table = report_tables.ops_table(next(iter(found.gpu.values())))
    assert [row[0] for row in table.rows] == ["qkv_linear/bf16", "quantize_rows-down/int8"]
    assert ["SLOWER" in row[-1] for row in table.rows] == [False, True]
    assert "sdpa-cudnn 3 (0.75x: ours is SLOWER), flex 5 (1.25x)" in report.readme_section(found)


def test_a_planted_wrong_kernel_shows_no_number(tmp_path: Path) -> None:
    wrong = {"case": WRONG, "verified": False, "reason": "worst tile distance 8.0e-01, budget 1.0e-05"}
    nothing = {"median_ms": None, "tflops": None, "gbps": None, "roofline": None, "peers": {"sdpa-cudnn": 7.77}}
    found = results(tmp_path, wrong | nothing)
    (row,) = report_tables.ops_table(next(iter(found.gpu.values()))).rows
    assert not any(row[2:])
    text = text_of(found)
    assert "not verified: worst tile distance 8.0e-01" in text
    assert "7.77" not in text, "a peer's time beside a wrong kernel reads as a comparison"


def test_a_ratio_without_a_span_behind_it_says_so() -> None:
    apart, turns = {**ENTRY, "case": SLOW, "median_ms": 4.0}, {**ENTRY, "case": GOOD, "span": "a"}
    header = {"gpu": "NVIDIA H200", "commit": "abcdef"}
    for entries, said in (
        ([apart], "Each kernel was timed alone"),
        ([apart, turns], "Some kernels were timed alone"),
        ([turns], "What is compared took turns"),
    ):
        assert said in report_tables.ops_table({**header, "entries": entries}).note


def test_a_wrong_kernel_with_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=f"{WRONG} is not verified"):
        results(tmp_path, {"case": WRONG, "verified": False})


def test_the_roofline_shows_the_slow_and_not_the_wrong(tmp_path: Path) -> None:
    nothing = {"median_ms": None, "tflops": None, "gbps": None, "roofline": None, "verified": False, "reason": "NaN"}
    found = results(tmp_path, {"case": GOOD}, {"case": SLOW, "median_ms": 4.0}, {"case": WRONG} | nothing)
    figure = report_figures.roofline(found)
    assert "2 measured" in figure.get_supxlabel().replace("\n", " ")
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert [float(line.get_ydata()[0]) for line in points] == [ENTRY["tflops"]] * 2


def test_what_was_verified_is_counted_and_told_with_its_gpu(tmp_path: Path) -> None:
    wrong = {"case": WRONG, "verified": False, "reason": "NaN", "peers": {}}
    nothing: dict[str, Any] = {"median_ms": None, "tflops": None, "gbps": None, "roofline": None}
    found = results(tmp_path, {"case": ATTENTION}, {"case": NORM}, wrong | nothing)
    sentence = "Verified on NVIDIA H200, commit abcdef"
    assert sentence in report.readme_section(found) and sentence in report.page_section(found)
    assert "2 of 3 pairs of op and kernel passed" in report.readme_section(found)
    (path,) = found.gpu
    path.with_suffix("").mkdir()
    lines = "cuda a bf16: passed, worst 1e-9, 0.1 s\ncuda b bf16: FAILED, worst 1, 0.1 s\n"
    (path.with_suffix("") / "self-check.txt").write_text(lines)
    assert "; 1 of 2 self-checks passed." in report.readme_section(found)


def test_a_share_of_the_measured_roof_stands_beside_the_datasheets(tmp_path: Path) -> None:
    found = results(tmp_path, {"case": ATTENTION, "tflops": 500.0, "gbps": 1.0}, {"case": NORM})
    (path,) = found.gpu
    data = json.loads(path.read_text())
    data["peaks"] = [
        {"bandwidth": 1.5, "bf16": 625.0, "fp8": None, "source": "measured"},
        {"bandwidth": 4.8, "bf16": 989.0, "fp8": 1979.0, "source": "datasheet"},
    ]
    path.write_text(json.dumps(data))
    found = report_data.load(tmp_path)
    (data,) = found.gpu.values()
    shares = {e["case"]: report_data.share_of(e, report_data.measured_ceilings(data)) for e in data["entries"]}
    # norm moves 1.843 TB/s, more than the copy: it is the ceiling then.
    assert shares == {ATTENTION: 0.8, NORM: 1.0}
    _, labels = report_figures.roofline(found).axes[0].get_legend_handles_labels()
    assert {"bf16, measured: 625", "bf16, datasheet: 989"} <= set(labels)


def test_the_picture_of_the_clip_tells_measured_from_extrapolated(tmp_path: Path) -> None:
    spent = {"block_sparse_attention": 3.0, "qkv_linear": 1.0}
    cut = RUN | {"mode": "eager", "note": "2 of 8 steps timed", "total_s": 70.0, "breakdown": {"attention": 8.0}}
    failed: dict[str, Any] = dict.fromkeys(("s_per_step", "total_s", "peak_memory_gib"))
    runs = (
        RUN | {"breakdown": spent, "attention": "hopper"},
        cut,
        RUN | failed | {"note": "out of memory", "cap_gb": 24},
    )
    axes = report_figures.figures(results(tmp_path, sampler=runs))["clip"].axes[0]
    bars = [(patch.get_hatch() or "", round(patch.get_width(), 3)) for patch in axes.patches]
    assert bars == [("///", 70.0), ("", round(28.1 * 0.75, 3)), ("", round(28.1 * 0.25, 3))]
    texts = {text.get_text().strip() for text in axes.texts}
    assert {"~70.0 s", "2 of 8 steps timed", "28.1 s", "8 steps"} <= texts
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eager bf16", "fast fp8, attention fp8, Gluon"]


def test_many_cases_hide_none_that_is_slow(tmp_path: Path) -> None:
    found = results(tmp_path, *({"case": case.name} for case in cases("full")))
    section = report.readme_section(found)
    assert [case.name for case in cases("full") if f"| {case.name} |" not in section] == [] and len(cases("full")) > 60


def test_a_planted_error_past_its_budget_is_marked() -> None:
    found = report_data.load()
    data = copy.deepcopy(found.equivalence)
    form = data["equivalence"][0]["forms"][1]
    form["violations"] = ["velocity.video is off by 5.00e-01, budget 1.09e-02 (2 x eager bf16's own)"]
    form["errors"]["velocity.video"]["relative_l2"] = None  # as JSON has an infinite error
    planted = dataclasses.replace(found, equivalence=data)
    text = text_of(planted)
    assert "FAIL: velocity.video is off by 5.00e-01" in text
    assert "past its budget" in report.readme_section(planted)
    assert "not finite" in text
    assert [row[-1][:4] for row in report_tables.error_table(planted.cases).rows[:3]] == ["pass", "FAIL", "pass"]


def test_a_clip_fits_a_card_with_room_for_the_context() -> None:
    assert 24 in cards_for(21.8 * 2**30)
    assert 24 not in cards_for(22.0 * 2**30)  # 24e9 bytes are 22.35 GiB
    assert 48 in cards_for(33.0 * 2**30)


@pytest.mark.parametrize(
    "readme", ["no markers", f"{report.BEGIN} {report.BEGIN} {report.END}", f"{report.END}{report.BEGIN}"]
)
def test_a_readme_without_its_markers_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        report.with_section(readme, "text")


def test_committed_memory_is_what_the_model_takes() -> None:
    # One of the twelve measured again: 1 s; all of them are 40 s.
    clip = report_measure.CLIPS[0]
    committed = report_data.load().memory
    for peak in committed["peaks"]:
        if (peak["preset"], peak["resolution"], peak["seconds"], peak["form"]) == (*clip, "fast fp8"):
            form = report_measure.SHOWN[-1]
            assert report_measure.rounded(report_measure._peak(form, *clip)) == peak
            return
    pytest.fail("no fp8 peak is committed")


def test_planned_peaks_of_8_bits_are_within_the_budgets_of_a_24_gb_card() -> None:
    committed = report_data.load().memory
    found = {
        (peak["form"], peak["seconds"]): peak["peak_gib"]
        for peak in committed["peaks"]
        if (peak["preset"], peak["resolution"]) == (targets.BASE, "1080p")
    }
    for form, (seconds, budget) in itertools.product(("fast int8", "fast fp8"), targets.PEAK_GIB.items()):
        assert found[form, seconds] <= budget and 24 in cards_for(budget * 2**30), (form, seconds)
    assert len(committed["peaks"]) == len(report_measure.CLIPS) * len(report_measure.SHOWN)


def test_errors_of_every_op_stand_side_by_side_in_the_readme() -> None:
    found = report_data.load()
    table = report_tables.op_table(found.cases)
    assert table.columns[2:5] == ("fast bf16", "fast int8, attention int8_qk", "fast fp8, attention fp8")
    for op, _, bf16, int8, fp8, _ in table.rows:
        worst = [float(cell.partition(" / ")[0]) for cell in (bf16, int8, fp8)]
        assert worst == sorted(worst) and worst[0] < worst[-1], op
    assert table.markdown() in report.readme_section(found)
    launches = {row[:2]: row[2:] for row in report_tables.launch_table(found.memory).rows}  # type: ignore[arg-type]
    assert launches["fast int8", "exact"] == ("9", "9", "9") and launches["fast fp8", "exact"][-1] == "7"
