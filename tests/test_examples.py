"""Every example runs on a CPU, prints what it says it shows, and is named in the README."""

from __future__ import annotations

import re
import runpy
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def errors(text: str) -> dict[str, float]:
    """Numbers by what stands in front of them."""
    return {name.strip(): float(x) for name, x in re.findall(r"^(.+): .*?([\d.]+(?:e-\d+)?)(?: from .*)?$", text, re.M)}


def test_the_readme_names_every_example_and_each_says_what_it_shows():
    # None has the name of a package that others look for: a script's folder comes first when Python searches.
    assert EXAMPLES == ["attention", "linear", "lora", "precisions", "sparse", "tiny_checkpoint"]
    readme = (ROOT / "README.md").read_text()
    for name in EXAMPLES:
        assert f"](examples/{name}.py)" in readme
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert text.startswith('"""Shows ') and f"python examples/{name}.py" in text


@pytest.mark.parametrize("name", ["tiny_checkpoint", "pony/fit_codec"])
def test_asked_for_help_it_writes_nothing(name, capsys, monkeypatch, tmp_path):
    """They make a folder of that name, and the codecs of the package anew in three minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "pony")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("started"))
    with pytest.raises(SystemExit):
        printed(name, capsys)
    assert "usage: " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_precisions(capsys):
    found = errors(printed("precisions", capsys))
    assert found["fast bf16"] < 2 * found["eager bf16"] < found["fast int8"] < found["fast fp8"] < 0.15


def test_attention(capsys):
    text = printed("attention", capsys)
    assert all(error < 5e-3 for error in (errors(text)[name] for name in ("dense", "two ranges", "frames")))
    assert "LSE (1, 4, 300), 40% of the pairs" in text


def test_linear(capsys):
    found = errors(printed("linear", capsys))
    assert found["bf16"] < 5e-3 < found["int8"] < 2e-2 < found["fp8"] < 5e-2


def test_lora(capsys):
    text = printed("lora", capsys)
    assert text.count("weights are what they were: True") == 2 and "False" not in text
    assert all(0.01 < moved < 0.5 for moved in map(float, re.findall(r"moved by ([\d.]+)", text)))


def test_sparse(capsys):
    found = errors(printed("sparse", capsys))
    assert 0 < found["TopK(keep=0.5)"] < found["TopK(keep=0.25)"] < 0.3
