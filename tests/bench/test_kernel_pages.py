"""The pictures of docs/kernels and docs/DESIGN.md in Mermaid: of known syntax, true to launch tables and launches."""

import re

import pytest

from bench.report import dataflow
from bench.results import ROOT
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.launches import launches_per_layer
from happyhorse_fast.kernels.launch import HOPPER_ARCH, config_for
from happyhorse_fast.ops.runtime.dispatch import STEMS

PAGES = sorted((ROOT / "docs" / "kernels").glob("*.md"))
WAY, TEXT = r"(\w+)--?>>(\w+)", r"[^;#]+"
SEQUENCE = re.compile(rf"participant \w+ as {TEXT}|{WAY}: {TEXT}|Note over (\w+)(?:,(\w+))?: {TEXT}|loop {TEXT}|end")
BOX = r'(\w+)(?:\["[^"]+"\])?'
FLOWCHART = re.compile(rf'{BOX}(?: -->(?:\|"[^"]+"\|)? {BOX})?')


def diagrams(text: str) -> list[str]:
    return re.findall(r"^```mermaid\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def problems(diagram: str) -> list[str]:
    """What a renderer would refuse, or would draw as another box; of the syntax that is used here."""
    kind, *lines = diagram.splitlines()
    grammar = {"sequenceDiagram": SEQUENCE, "flowchart TD": FLOWCHART}.get(kind)
    if grammar is None:
        return [kind]
    declared = set(re.findall(r"participant (\w+) as" if grammar is SEQUENCE else r'(\w+)\["', diagram))
    found, open_loops = [], 0
    for line in map(str.strip, lines):
        match = grammar.fullmatch(line)
        open_loops += line.startswith("loop ") - (line == "end")
        if match is None or not {name for name in match.groups() if name} <= declared or open_loops < 0:
            found.append(line)
    return found + ["a loop without its end"] * open_loops


def test_every_launch_table_has_a_page_with_a_picture():
    stems = {path.stem for path in (ROOT / "kernels" / "configs").glob("*.json")}
    assert stems == {path.stem for path in PAGES} == set(STEMS.values())
    for page in PAGES:
        text = page.read_text()
        assert f"`kernels/{page.stem}" in text and len(diagrams(text)) == 1


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "DESIGN.md"], ids=lambda page: page.stem)
def test_pictures_are_of_the_syntax_that_renderers_know(page):
    (diagram,) = diagrams(page.read_text())
    assert problems(diagram) == []


@pytest.mark.parametrize(
    ("diagram", "problem"),
    [
        ("graph LR\n", "graph LR"),
        ("sequenceDiagram\n    participant A as a\n    A->>B: x", "A->>B: x"),
        ("sequenceDiagram\n    participant A as a\n    A->>A: x; y", "A->>A: x; y"),
        ("sequenceDiagram\n    participant A as a\n    loop x\n    A->>A: x", "a loop without its end"),
        ("sequenceDiagram\n    participant A as a\n    end", "end"),
        ('flowchart TD\n    a[x [N]] --> b["y"]', 'a[x [N]] --> b["y"]'),
        ('flowchart TD\n    a["x"] --> b', 'a["x"] --> b'),
    ],
)
def test_a_planted_mistake_of_syntax_is_found(diagram, problem):
    assert problems(diagram) == [problem]


@pytest.mark.parametrize(("stem", "variant"), [("qkv", "qkv_fp8"), ("linear", "fp8_residual")])
def test_pictures_of_products_have_the_sizes_of_the_launch_table(stem, variant):
    config = config_for(stem, variant, HOPPER_ARCH)
    text = (ROOT / "docs" / "kernels" / f"{stem}.md").read_text()
    (diagram,) = diagrams(text)
    assert f"groups of {config.group_m} row tiles" in text.replace("\n", " ")
    columns = "2 heads" if stem == "qkv" else f"{config.block_n} columns"
    kib = (config.block_m + config.block_n) * config.block_k // 1024
    for words in (
        f"ring of {config.num_stages} slots",
        f"{config.num_warps} warps",
        f"tile of {config.block_m} rows x {columns}",
        f"first {config.num_stages - 1} slots",
        f"load {config.num_stages - 1} slots ahead",
        f"loop {config.block_k} of K",
        f"{kib} KiB",
    ):
        assert words in diagram


@pytest.mark.parametrize("precision", dataflow.FORMS)
def test_the_launches_of_a_layer_are_those_that_a_layer_makes_in_order(precision):
    before, *seen = dataflow.written(precision)
    steps = list(dict.fromkeys(made.step for made in seen))
    (counted, *_) = launches_per_layer(FastConfig(precision=precision, attention=dataflow.FORMS[precision]))
    ours = [name.partition("::")[2].removesuffix("_reference") for name in counted if "happyhorse_fast::" in name]
    assert [dataflow.OPS[step] for step in steps] == [name for name in ours if name in dataflow.RESULTS]
    assert steps == [step for step in dataflow.OPS if step in steps]
    assert [made.step for made in seen if not made.readers] == steps[-1:], "the next layer reads what the last writes"
    assert (before.step, before.name, before.readers) == (dataflow.BEFORE, "hidden", ["norm 1", "proj"])


def test_the_flowchart_has_every_step_and_every_tensor_between_two():
    drawn = dataflow.flowchart()
    for step in (*dataflow.OPS, dataflow.AFTER):
        assert f'["{step}' in drawn
    for writer, tensor, shape, *_, readers in dataflow.table().rows:
        boxes = [re.search(rf'(\w+)\["{step}', drawn) for step in (writer.partition(":")[0], *readers.split(", "))]
        first, *others = (box[1] for box in boxes if box)
        for other in others:
            assert re.search(rf'{first} -->\|"[^|]*\b{re.escape(f"{tensor} {shape}")}[^|]*"\| {other}\n', drawn)


def test_a_size_of_the_model_that_is_shown_says_which_dimension_it_is():
    assert len(dataflow.LETTERS) == 9, "two dimensions have one size"
