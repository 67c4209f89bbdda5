"""Every path, make target, command and link that the documentation names exists."""

import inspect
import re
from pathlib import Path

import pytest

from happyhorse_fast import ops

ROOT = Path(__file__).parents[1]
SUFFIXES = (".cu", ".cuh", ".hpp", ".json", ".md", ".py", ".safetensors", ".toml", ".txt", ".yaml")
# Names with a slash or a suffix that mean something other than a file of the repository.
ELSEWHERE = {
    ".venv/",  # what the Makefile makes
    ".commits/",
    ".primed/",
    "GAIR-NLP/daVinci-MagiHuman",  # the public model's repository
    "model.safetensors.index.json",  # a checkpoint folder's
}


def documents(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def repository_paths(text: str) -> set[str]:
    """Inline code that reads as a path: a slash or a known suffix, no spaces, placeholders or commands."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", prose)
    shaped = (s for s in spans if re.fullmatch(r"\.?[\w-][\w.*/-]*", s) and ("/" in s or s.endswith(SUFFIXES)))
    return {s for s in shaped if s not in ELSEWHERE}


def code_lines(text: str) -> list[str]:
    """Inline code, and the lines of fenced and indented blocks."""
    fenced = re.findall(r"^( *)```.*?\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for _, block in fenced for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return lines + re.findall(r"`([^`\n]+)`", text)


def named_after(program: str, text: str) -> set[str]:
    """First words after a program's name in code, options and assignments skipped."""
    pattern = rf"^{program}((?:\s+(?:-\S+|\w+=\S+))*)\s+([a-z][\w-]*)"
    return {m[2] for line in code_lines(text) if (m := re.match(pattern, line))}


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


def links(text: str) -> list[str]:
    """Relative link targets, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


def problems(root: Path, commands: set[str]) -> list[str]:
    targets = make_targets((root / "Makefile").read_text())
    found = []
    for document in documents(root):
        text, name = document.read_text(), document.relative_to(root)
        found += [f"{name}: no path {p}" for p in sorted(repository_paths(text)) if not any(root.glob(p))]
        found += [f"{name}: no target make {t}" for t in sorted(named_after("make", text) - targets)]
        found += [f"{name}: no command {c}" for c in sorted(named_after("happyhorse-fast", text) - commands)]
        found += [f"{name}: dead link {t}" for t in links(text) if not (document.parent / t).exists()]
    return found


def commands_of_the_package() -> set[str]:
    from typer.main import get_command

    from happyhorse_fast.cli import app

    return set(get_command(app).commands)


def test_the_documentation_names_only_what_exists():
    assert {"README.md", "CONTRIBUTING.md", "DESIGN.md"} <= {d.name for d in documents(ROOT)}
    assert problems(ROOT, commands_of_the_package()) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("See `happyhorse_fast/gone.py`.", "no path happyhorse_fast/gone.py"),
        ("See `gone.toml`.", "no path gone.toml"),
        ("See `docs/decisions/9999-*.md`.", "no path docs/decisions/9999-*.md"),
        ("Run `make gone`.", "no target make gone"),
        ("```sh\nmake PYTHON=python3.12 gone\n```", "no target make gone"),
        ("    make gone", "no target make gone"),
        ("Run `happyhorse-fast --json gone`.", "no command gone"),
        ("[here](docs/gone.md#part)", "dead link docs/gone.md"),
    ],
)
def test_a_planted_mistake_is_found(tmp_path, text, problem):
    (tmp_path / "Makefile").write_text("test: ## run\n")
    (tmp_path / "README.md").write_text(text)
    assert problems(tmp_path, {"demo"}) == [f"README.md: {problem}"]


def python_examples(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_python_examples_of_the_readme_run_on_a_cpu_but_the_last():
    *examples, last = python_examples(ROOT / "README.md")
    assert len(examples) == 3
    assert 'device="cuda"' in last
    names: dict = {}
    for example in examples:
        exec(example, names)
    assert names["video"].shape == names["velocity_video"].shape == (1, 48, 3, 8, 8)
    assert names["audio"].isfinite().all()


def test_the_python_examples_of_the_ops_run():
    names: dict = {}
    layer, attention = python_examples(ROOT / "docs/OPS.md")
    exec(layer, names)
    assert names["y"].shape == (261, 512)
    assert names["y"].isfinite().all()
    exec(attention, names)
    assert names["out"].shape == names["q"].shape and names["lse"].shape == (1, 4, 300)


def test_the_signatures_of_the_ops_are_the_functions():
    """Names, order, and what is by keyword alone; `keep | mass` are two."""
    signatures = re.findall(r"^`(\w+)\((.*)\) -> ", (ROOT / "docs/OPS.md").read_text(), flags=re.MULTILINE)
    assert len(signatures) == 10
    for name, parameters in signatures:
        written = [p.split("=")[0].strip() for p in parameters.replace(" | ", ", ").split(",")]
        real = inspect.signature(getattr(ops, name)).parameters.values()
        by_place = [p.name for p in real if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert written == [*by_place, "*", *(p.name for p in real if p.kind is p.KEYWORD_ONLY)], name
        defaults = dict(re.findall(r"(\w+)=(\"?[\w]+\"?)", parameters))
        assert {p.name: repr(p.default).replace("'", '"') for p in real if p.name in defaults} == defaults, name


def test_what_exists_is_not_reported(tmp_path):
    (tmp_path / "Makefile").write_text("test: ## run\n")
    (tmp_path / "README.md").write_text(
        "`make test`, `make PYTHON=python3 test`, `happyhorse-fast demo`; `README.md`, `*.md`; `1 / 2`, `a/<b>`\n\n"
        "[self](README.md#part) [web](https://example.org/x) [part](#part)\n```sh\nls gone/x.py\n```\n"
    )
    assert problems(tmp_path, {"demo"}) == []
