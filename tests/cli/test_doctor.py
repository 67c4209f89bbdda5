"""``doctor``: what it finds, and that a narrow terminal hides nothing."""

from __future__ import annotations

import functools
import io
import json

import pytest
import torch
from rich.console import Console

from happyhorse_fast.cli import doctor, run
from happyhorse_fast.ops.runtime import obstacles

torch.set_num_threads(1)

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def test_doctor(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(doctor.optional, "version_of", lambda name: None)
    monkeypatch.setattr(obstacles, "triton_obstacle", lambda device: "no GPU")
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(doctor, "examine", functools.cache(doctor.examine))
    assert run(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["torch"]["version"] == torch.__version__
    assert (data["driver"], data["nvcc"], data["triton"]) == (None, None, None)
    runs = {line["what"]: line for line in data["runs"]}
    assert runs["eager bfloat16 reference"]["runs"] is True
    assert (runs["fast fp8 kernels"]["runs"], runs["fast fp8 kernels"]["why"]) == (False, "no GPU")
    assert runs["fast fp8 backend reference"]["runs"]
    assert run(["doctor"]) == 0
    assert "what runs here" in capsys.readouterr().out


def test_a_narrow_terminal_shows_what_runs_and_why(monkeypatch: Patch, capsys: Capture) -> None:
    """rich drops a column that may not fold where others may not either."""
    why = "Triton kernels need a GPU, the model is on cpu (TRITON_INTERPRET=1 runs them slowly on the CPU)"
    monkeypatch.setattr(obstacles, "triton_obstacle", lambda device: why)
    monkeypatch.setattr(doctor, "_first_match", lambda *_: None)
    data = doctor.examine()
    console = Console(width=80, file=io.StringIO())
    for part in doctor.shown(data):
        console.print(part)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    first = next(i for i, line in enumerate(lines) if line.startswith(" runs"))
    table = lines[first + 2 : lines.index("", first)]
    assert {line.split()[0] for line in table if line[1:2].strip()} == {"yes", "no"}
    assert why.split()[-1] in " ".join(table)
