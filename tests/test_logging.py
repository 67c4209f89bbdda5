"""What the package tells goes to loggers named by its modules, so that `happyhorse_fast` has them all."""

import ast
from pathlib import Path

import pytest

import happyhorse_fast
from happyhorse_fast import kernels

PACKAGE = Path(happyhorse_fast.__file__).parent
# What its process prints is its result.
COMMANDS = {"cli", "hosts/hub/__main__.py"}
# It tells vLLM's logger to show them.
JOINS = {
    "hosts/vllm_omni.py": {"logging.getLogger('happyhorse_fast')", "logging.getLogger('vllm')", "logging.getLogger()"}
}
LEVELS = ("debug", "info", "warning", "error", "critical", "exception")
ROOT = {f"logging.{name}" for name in ("basicConfig", "log", *LEVELS)}
pytestmark = pytest.mark.slow


def faults(text):
    """Lines of a module that tell something elsewhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "warnings.warn", "sys.stderr.write", "sys.stdout.write"):
                yield node.lineno, called
            elif called == "logging.getLogger":
                if ast.unparse(node).partition("(")[2] != "__name__)":
                    yield node.lineno, ast.unparse(node)
            elif called in ROOT:
                yield node.lineno, called


def test_no_module_tells_anything_but_by_its_own_logger():
    modules = [*PACKAGE.rglob("*.py"), *Path(kernels.__file__).parent.glob("*.py")]
    assert len(modules) > 200
    found = {
        f"{path}:{line}": what
        for path in modules
        if not any(f"{path}".startswith(f"{PACKAGE / command}") for command in COMMANDS)
        for line, what in faults(path.read_text())
        if not any(what in JOINS[name] for name in JOINS if path == PACKAGE / name)
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "def f():\n    warnings.warn('x', stacklevel=2)",
        "logging.getLogger('happyhorse_fast').info('x')",
        "logging.getLogger().info('x')",
        "logging.warning('x')",
        "logging.basicConfig()",
        "print('x', file=sys.stderr)",
    ],
)
def test_other_ways_are_found(text):
    assert list(faults(text))
    assert not list(faults("logger = logging.getLogger(__name__)\nlogger.warning('x')\nclass A(logging.Handler): ..."))
