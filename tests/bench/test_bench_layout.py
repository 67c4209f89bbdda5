"""bench imports in one direction: no circle, and no folder takes another's private names."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from bench.bootstrap import ROOT


def modules(root: Path) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "bench").rglob("*.py"))
    }


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import from bench, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bench":
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "bench"]
    return found


def problems(root: Path) -> list[str]:
    known, found = modules(root), []
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        for module, member in imports(path):
            below = f"{module}.{member}"
            graph.setdefault(name, set()).add(below if below in known else module)
            if member.startswith("_") and module.rpartition(".")[0] != name.rpartition(".")[0]:
                found.append(f"{name} takes {member} of {module}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"import circle: {' <- '.join(error.args[1])}")
    return found


def test_bench_has_no_import_circle_and_takes_no_private_name():
    assert len(modules(ROOT)) > 40
    assert problems(ROOT) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a": "from bench.b import x", "b": "def f():\n    from bench import a"}, "import circle"),
        ({"one/a": "from bench.two.b import _x", "two/b": ""}, "bench.one.a takes _x of bench.two.b"),
    ],
)
def test_a_planted_violation_is_found(files, problem, tmp_path):
    for name, text in files.items():
        path = tmp_path / "bench" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (found,) = problems(tmp_path)
    assert problem in found
