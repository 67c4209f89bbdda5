"""``make report``: one HTML page, its pictures, and generated sections of READMEs, notes and kernels' pages.

python -m bench.report              # docs/report/, then README, examples/pony/README, and docs/{DESIGN,notes,kernels}
python -m bench.report --readme     # the sections alone
"""

from __future__ import annotations

import argparse
import base64
import html
import re
from pathlib import Path

from bench import targets
from bench.report import dataflow, kernel_tables, pony, preferences, tables
from bench.report import figures as report_figures
from bench.report.data import EQUIVALENCE, Report, load, verified
from bench.results import ROOT, Json

PAGE = "index.html"
README = ROOT / "README.md"
PONY_README = ROOT / "examples" / "pony" / "README.md"
NOTES = ROOT / "docs" / "notes" / "hopper.md"
DESIGN = ROOT / "docs" / "DESIGN.md"
OUT = ROOT / "docs" / "report"
BEGIN, END = "<!-- generated: python -m bench.report --readme -->", "<!-- end of generated -->"
# Name of a picture -> what it shows and how to read it.
CAPTIONS = {
    "clip": "Seconds of a whole clip by form and op; hatched bars are extrapolated from the steps that were timed.",
    "roofline": "Where the layer's ops can go at most: by the datasheet, and by what was ever measured on that card.",
    "memory": "What lives beside the weights while a layer runs.",
    "block_maps": "What attention computes, skips, and masks inside a block.",
    "error_per_layer": "Error of the residual stream: rounding, kernels, int8, fp8, sparsity.",
    "fidelity": "Clips of the trained small model under every precision and sparsity, against float32's.",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0}h3{font-size:1rem;margin:1.4rem 0 .4rem}
h2{margin:2.4rem 0 .4rem;border-bottom:1px solid #e6e8eb}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption,.note{color:#6b737d;font-size:.86rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .7rem;border-bottom:1px solid #e6e8eb;text-align:right;white-space:nowrap}
th:first-child,td:first-child,td:nth-child(2),.text{text-align:left}tr.mark td{background:#fff0f0;color:#c92a2a}
"""


def page(report: Report, pictures: list[Path]) -> str:
    """The whole page as HTML with everything embedded."""
    by_name = {path.stem: path for path in pictures}

    def figure(name: str) -> str:
        if name not in by_name:
            return ""
        data = base64.b64encode(by_name[name].read_bytes()).decode()
        caption = html.escape(CAPTIONS[name])
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    parts = [
        "<h2>Speed</h2>",
        *(f"<p>{html.escape(verified(*item))}</p>" for item in reversed(report.gpu.items())),
        *(table.html() for data in reversed(report.gpu.values()) for table in tables.gpu_tables(data)),
        *(f"<p class=note>Peers that were absent: {html.escape(_absent(data))}.</p>" for data in report.gpu.values()),
        *map(figure, ("clip", "roofline")),
        "<h2>Memory and launches</h2>",
        figure("memory"),
        tables.memory_table(report.memory).html(),
        tables.launch_table(report.memory).html(),
        "<h2>Error</h2>",
        figure("error_per_layer"),
        tables.error_table(report.cases).html(),
        tables.op_table(report.cases).html(),
        f"<p class=note>{html.escape(_where_measured(report.equivalence))}</p>",
        "<h2>A trained model: clips of the pony</h2>",
        *(table.html() for table in pony.own_tables(report)),
        figure("fidelity"),
        "<h2>Block maps</h2>",
        figure("block_maps"),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>happyhorse_fast: results</title><style>{_STYLE}</style>"
        "<h1>happyhorse_fast: results</h1><p>Made by <code>make report</code> from the files in "
        "<code>bench/results/</code>. Predictions and plans are named as such; the rest is measured.</p>"
        + "\n".join(parts)
        + "</html>\n"
    )


def _absent(data: Json) -> str:
    return "; ".join(f"{name}: {why}" for name, why in data["absent"].items()) or "none"


def _where_measured(data: Json) -> str:
    backends = sorted({b for case in data["equivalence"] for form in case["forms"] for b in form["backends"]})
    plain = " (plain torch with the kernels' rounding points)" if backends == ["reference"] else ""
    return (
        f"Errors of {EQUIVALENCE.parent.name}/{EQUIVALENCE.name}: on {data['gpu']}, fast forms on backend "
        f"{', '.join(backends)}, torch {data['torch']}, commit {data['commit']}{plain}."
    )


def readme_section(report: Report) -> str:
    """Write what stands between README's markers."""
    path, newest = report.newest
    parts = [
        verified(path, newest),
        "![Seconds of a clip by form and op](docs/report/clip.png)",
        *(table.markdown() for table in tables.gpu_tables(newest)),
        tables.memory_table(report.memory).markdown(),
        "![Live memory along a layer of each kind](docs/report/memory.png)",
        tables.launch_table(report.memory).markdown(),
        tables.error_summary(report.cases).markdown(),
        tables.op_table(report.cases).markdown(),
        _where_measured(report.equivalence),
        "![Error per layer](docs/report/error_per_layer.png)",
        *pony.section(report),
        "All of it, with the roofline, each op's error and the block maps: `docs/report/index.html` (`make report`).",
    ]
    return "\n\n".join(parts)


def sections(report: Report) -> dict[Path, str]:
    """Write what stands between the markers of each file."""
    # Targets, clip, ops and predictions of every GPU.
    notes = "\n\n".join(targets.text(data, markdown=True) for data in report.gpu.values())
    pages = {kernel_tables.page(stem): kernel_tables.section(report, stem) for stem in kernel_tables.OPS}
    own = {README: readme_section(report), PONY_README: pony.own_section(report), NOTES: notes}
    return own | pages | {DESIGN: f"{dataflow.flowchart()}\n\n{dataflow.table().markdown()}"}


def with_section(readme: str, section: str) -> str:
    """README with a new generated section.

    Raises:
        ValueError: The two markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README must hold the markers {BEGIN!r} and {END!r} once each, in this order")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{section}\n\n{END}", readme, flags=re.DOTALL)


def write_report(report: Report, out: Path) -> list[Path]:
    """Draw the pictures and write the page into a folder; returns every file."""
    pictures = report_figures.save(report_figures.figures(report) | pony.figures(report), out)
    (out / PAGE).write_text(page(report, pictures), encoding="utf-8")
    return [*pictures, out / PAGE]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the sections alone")
    options = parser.parse_args()
    report = load()
    if not options.readme:
        for path in write_report(report, OUT):
            print(path)
        preferences.write(report.gpu.values())
    for path, section in sections(report).items():
        path.write_text(with_section(path.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main()
