"""``make report``: pictures, and generated sections of READMEs, notes and kernels' pages.

python -m bench.report              # docs/report/*.png, then sections of READMEs and docs/{DESIGN,notes,kernels,report}
python -m bench.report --readme     # the sections alone
python -m bench.report --html FILE  # README's results, docs/report and the pony's as one page, pictures embedded
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path

from bench import targets
from bench.report import dataflow, figures, kernel_tables, pony, tables
from bench.report.data import EQUIVALENCE, Report, load, verified
from bench.report.preferences import preferences
from bench.results import ROOT, Json
from happyhorse_fast.ops.runtime.dispatch import PREFERENCES, STEMS

README = ROOT / "README.md"
PONY_README = ROOT / "examples" / "pony" / "README.md"
NOTES = ROOT / "docs" / "notes" / "hopper.md"
DESIGN = ROOT / "docs" / "DESIGN.md"
KERNELS = ROOT / "docs" / "kernels"
OUT = ROOT / "docs" / "report"
PAGE = OUT / "README.md"
DPI = 110
BEGIN, END = "<!-- generated: python -m bench.report --readme -->", "<!-- end of generated -->"


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
        "The roofline, block maps, and every form's error beside its budget: [docs/report](docs/report/README.md) "
        "(`make report`).",
    ]
    return "\n\n".join(parts)


def page_section(report: Report) -> str:
    """Write what stands between the markers of docs/report: each GPU's peers that were absent, and all errors."""
    gpus = [
        f"{verified(path, data)} Peers that were absent: "
        f"{'; '.join(f'{name}: {why}' for name, why in data['absent'].items()) or 'none'}."
        for path, data in reversed(report.gpu.items())
    ]
    return "\n\n".join([*gpus, tables.error_table(report.cases).markdown(), _where_measured(report.equivalence)])


def sections(report: Report) -> dict[Path, str]:
    """Write what stands between the markers of each file."""
    # Targets, clip, ops and predictions of every GPU.
    notes = "\n\n".join(targets.text(data, markdown=True) for data in report.gpu.values())
    pages = {KERNELS / f"{stem}.md": kernel_tables.section(report, stem) for stem in set(STEMS.values())}
    own = {README: readme_section(report), PAGE: page_section(report), PONY_README: pony.own_section(report)}
    return own | pages | {NOTES: notes} | {DESIGN: f"{dataflow.flowchart()}\n\n{dataflow.table().markdown()}"}


def with_section(readme: str, section: str) -> str:
    """README with a new generated section.

    Raises:
        ValueError: The two markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README must hold the markers {BEGIN!r} and {END!r} once each, in this order")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{section}\n\n{END}", readme, flags=re.DOTALL)


def html() -> str:
    """Write the generated parts of READMEs and all of docs/report as one HTML page, which needs no other file."""
    from markdown_it import MarkdownIt

    def embedded(page: Path) -> str:
        def picture(found: re.Match[str]) -> str:
            data = base64.b64encode((page.parent / found[1]).read_bytes()).decode()
            return f'src="data:image/png;base64,{data}"'

        text = page.read_text(encoding="utf-8")
        text = text if page == PAGE else text.partition(BEGIN)[2].partition(END)[0]
        return re.sub(r'src="(\S+?\.png)"', picture, MarkdownIt("commonmark").enable("table").render(text))

    style = "body{font:15px/1.5 sans-serif;max-width:75em;margin:auto}img{max-width:100%}td,th{padding:.2em .6em}"
    body = "".join(embedded(page) for page in (README, PAGE, PONY_README))
    return f'<!doctype html><meta charset="utf-8"><title>happyhorse_fast: results</title><style>{style}</style>{body}'


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the sections alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page, from what is written, and no more")
    options = parser.parse_args()
    if options.html:
        options.html.write_text(html(), encoding="utf-8")
        return
    report = load()
    if not options.readme:
        for name, figure in (figures.figures(report) | pony.figures(report)).items():
            figure.savefig(OUT / f"{name}.png", dpi=DPI, metadata={"Software": None})
        PREFERENCES.write_text(json.dumps(preferences(report.gpu.values()), indent=1) + "\n")
    for path, section in sections(report).items():
        path.write_text(with_section(path.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main()
