"""The dependency arrow of docs/DESIGN.md, held against the imports that the sources really have."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "happyhorse_fast"
MAX_LINES = 400

# First name below the package -> layer. A module imports from its own layer and lower ones.
LAYERS = {
    "_C": 0,
    "_version": 0,
    "block_map": 0,
    "ambient": 0,
    "arguments": 0,
    "budgets": 0,
    "config": 0,
    "costs": 0,
    "files": 0,
    "json_data": 0,
    "moved": 0,
    "optional": 0,
    "parallel": 0,
    "tokens": 0,
    "eager": 1,
    "kernels": 2,
    "csrc": 2,
    "ops": 3,
    "fast": 4,
    "checkpoint": 5,
    "golden": 5,
    "pipeline": 5,
    "pony": 5,
    "sampler": 5,
    "hosts": 6,
    "verify": 6,
    "": 6,  # happyhorse_fast/__init__.py: offers what users import, so only the command line may build on it
    "__main__": 7,
    "cli": 7,
}
# Compiled code -> who may import it. ops/ alone sees both a kernel and its reference; block_map/ calls the host module.
COMPILED = {"kernels": ("ops",), "csrc": ("ops",), "_C": ("block_map", "ops")}
COMPILED_MODULES = {f"{PACKAGE}._C"}
MAPPED = ("kernels", "csrc")
"""Top-level folders that setup.py maps into the package."""
MOST_LAZY_IMPORTS = 55
NATIVE = (".cu", ".cuh", ".cpp", ".hpp")


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of everything that imports as part of the package."""
    for folder, prefix in ((root / PACKAGE, PACKAGE), *((root / name, f"{PACKAGE}.{name}") for name in MAPPED)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([prefix, *parts]), path


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever in the file: lazy and type-only ones are dependencies as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def part_of(dotted: str, root: Path) -> str | None:
    """The first name below the package, "" for the package itself, None for another distribution."""
    first, _, rest = dotted.partition(".")
    if first != PACKAGE:
        return None
    name = rest.partition(".")[0]
    is_module = any((root / PACKAGE / f"{name}{end}").exists() for end in ("", ".py", ".pyi"))
    return name if name in LAYERS or is_module else ""


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in the file."""
    found = {module.removesuffix(".__init__"): (module, path) for module, path in sources(root)}
    graph: dict[str, set[str]] = {}
    for name, (module, path) in found.items():
        dotted = {there for _, there in imports(ast.parse(path.read_text()), module)} - COMPILED_MODULES
        graph[name] = {there if there in found else there.rpartition(".")[0] for there in dotted} & found.keys()
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of several modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    far = {name: reached(name) for name in graph}
    groups = {frozenset([name, *(there for there in far[name] if name in far[there])]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def lazy_imports(root: Path) -> list[str]:
    """Imports of the package's own modules inside functions."""
    found = set()
    for module, path in sources(root):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= {
                    f"{module}:{line}: {dotted}"
                    for line, dotted in imports(function, module)  # type: ignore[arg-type]
                    if dotted.partition(".")[0] == PACKAGE
                }
    return sorted(found)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in NATIVE and (lines := path.read_text().count("\n")) > MAX_LINES:
            found.append(f"csrc/{path.name}: {lines} lines, at most {MAX_LINES} allowed")
    for module, path in sources(root):
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_LINES:
            found.append(f"{module}: {lines} lines, at most {MAX_LINES} allowed")
        here = module.split(".")[1].replace("__init__", "")
        if here not in LAYERS:
            found.append(f"{module}: {here!r} has no layer; add it to LAYERS here and to docs/DESIGN.md")
            continue
        for line, dotted in imports(ast.parse(text), module):
            there = part_of(dotted, root)
            if (name := dotted.partition(".")[0]) in MAPPED:
                found.append(f"{module}:{line}: imports {dotted}; it imports as {PACKAGE}.{name}")
            if there is None:
                continue
            if there not in LAYERS:
                found.append(f"{module}:{line}: imports {dotted}, and {there!r} has no layer")
            elif LAYERS[there] > LAYERS[here]:
                found.append(f"{module}:{line}: imports {dotted} against the arrow")
            elif there in COMPILED and here not in (there, *COMPILED[there]):
                found.append(f"{module}:{line}: imports {dotted}; only {'/, '.join(COMPILED[there])}/ may")
            elif here in COMPILED and there != here and LAYERS[there] > 0:
                found.append(f"{module}:{line}: imports {dotted}; {here} may not see {there}")
    return found


def test_verify_prints_nothing_and_bench_needs_no_command():
    printers = {
        (module, dotted)
        for module, path in sources(ROOT)
        if module.startswith(f"{PACKAGE}.verify")
        for _, dotted in imports(ast.parse(path.read_text()), module)
        if dotted.partition(".")[0] in ("rich", "typer")
    }
    assert printers == set()
    commands = {
        dotted
        for path in (ROOT / "bench").rglob("*.py")
        for _, dotted in imports(ast.parse(path.read_text()), "bench")
        if dotted.startswith(f"{PACKAGE}.cli")
    }
    assert commands == {f"{PACKAGE}.cli.fidelity_tables"}


def test_no_import_points_against_the_arrow():
    assert len(list(sources(ROOT))) > 5, "the sources were not found, so nothing was checked"
    assert violations(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph(ROOT)
    assert "happyhorse_fast.block_map.bits" in graph["happyhorse_fast.block_map.map"], "the graph was not read"
    assert circles(graph) == []


def test_there_are_no_more_lazy_imports_than_there_were():
    """Each has a reason: what it imports needs Triton, a GPU or an optional package, or is slow to import."""
    found = lazy_imports(ROOT)
    assert found, "the sources were not found, so nothing was checked"
    assert len(found) <= MOST_LAZY_IMPORTS, "\n".join(found)


def test_a_planted_circle_and_lazy_import_are_found(tmp_path):
    plant(tmp_path, "happyhorse_fast/ops/a/__init__.py", "def f():\n    from happyhorse_fast.ops.b import g")
    plant(
        tmp_path, "happyhorse_fast/ops/b.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c"
    )
    plant(tmp_path, "happyhorse_fast/ops/c.py", "import happyhorse_fast.ops.a\nfrom happyhorse_fast import _C, ops")
    plant(tmp_path, "happyhorse_fast/ops/__init__.py", "import math")
    plant(tmp_path, "happyhorse_fast/__init__.py", "from happyhorse_fast.ops import b")
    names = [f"happyhorse_fast.ops.{name}" for name in "abc"]
    assert circles(import_graph(tmp_path)) == [names]
    assert lazy_imports(tmp_path) == ["happyhorse_fast.ops.a.__init__:2: happyhorse_fast.ops.b.g"]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("happyhorse_fast/config.py", "import happyhorse_fast.eager.model", "against the arrow"),
        ("happyhorse_fast/eager/mlp.py", "from happyhorse_fast import ops", "against the arrow"),
        ("happyhorse_fast/eager/mlp.py", "from ..sampler import sample", "against the arrow"),
        ("happyhorse_fast/fast/new.py", "def f():\n    from happyhorse_fast.cli import main", "against the arrow"),
        ("happyhorse_fast/fast/new.py", "from happyhorse_fast import ModelConfig", "against the arrow"),
        ("happyhorse_fast/fast/new.py", "from happyhorse_fast.checkpoint.load import load", "against the arrow"),
        ("happyhorse_fast/fast/new.py", "import importlib\nimportlib.import_module('happyhorse_fast.cli')", "arrow"),
        ("happyhorse_fast/fast/new.py", "import happyhorse_fast.kernels.mlp", "only ops/ may"),
        ("kernels/mlp.py", "from happyhorse_fast.eager import mlp", "kernels may not see eager"),
        ("kernels/deep/mlp.py", "from happyhorse_fast.eager import mlp", "kernels may not see eager"),
        ("csrc/build.py", "from happyhorse_fast.eager import mlp", "csrc may not see eager"),
        ("happyhorse_fast/costs.py", "from happyhorse_fast import _C", "only block_map/, ops/ may"),
        ("happyhorse_fast/fast/new.py", "from happyhorse_fast._C import from_ranges", "only block_map/, ops/ may"),
        ("happyhorse_fast/ops/mlp.py", "import kernels.mlp", "it imports as happyhorse_fast.kernels"),
        ("csrc/device/mlp.cu", "// x\n" * (MAX_LINES + 1), "lines, at most"),
        ("happyhorse_fast/novel.py", "", "has no layer"),
        ("happyhorse_fast/config.py", "x = 1\n" * (MAX_LINES + 1), "lines, at most"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, text, message):
    plant(tmp_path, path, text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("happyhorse_fast/__init__.py", "from happyhorse_fast.sampler import sample"),
        ("happyhorse_fast/cli/main.py", "import happyhorse_fast as hh\nfrom happyhorse_fast import ModelConfig"),
        ("happyhorse_fast/ops/mlp.py", "from happyhorse_fast import eager, kernels"),
        ("happyhorse_fast/block_map/fast.py", "from happyhorse_fast import _C"),
        ("happyhorse_fast/eager/__init__.py", "from . import mlp"),
        ("kernels/mlp.py", "from happyhorse_fast.kernels import tiles\nfrom happyhorse_fast.config import PATCH"),
    ],
)
def test_what_the_arrow_allows_is_not_reported(tmp_path, path, text):
    plant(tmp_path, path, text)
    assert violations(tmp_path) == []


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
