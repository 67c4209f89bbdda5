"""Commits in turns, on a CPU: stand-ins for commits whose kernel is right, is wrong, never ends or ends its process."""

from __future__ import annotations

import re
import shutil
from unittest import mock

import pytest

from bench import commits
from bench.bootstrap import ROOT

ASKED = ["time", "--device", "cpu", "--scope", "tiny", "--cases", "down/tiny/fp8", "--impl", "triton", "--seconds", "0"]
PLANTED = {"wrong": "None", "endless": "time.sleep(600)", "dead": "os._exit(7)"}
"""Commit -> what its launch does."""
LAUNCH = """

import os, time

class Planted(type(fp8_linear_kernel)):
    def __getitem__(self, grid):
        return lambda *arguments, **options: {}

fp8_linear_kernel.__class__ = Planted
"""


def tree(folder, launch):
    """Sources of a stand-in."""
    folder.mkdir()
    for part in ("bench", "csrc", "happyhorse_fast"):
        (folder / part).symlink_to(ROOT / part)
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    if launch is not None:
        launched = folder / "kernels" / "linear.py"
        launched.write_text(launched.read_text() + LAUNCH.format(launch))


@pytest.mark.slow
def test_a_module_of_a_commit_runs_with_its_kernels(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(commits, "FOLDER", tmp_path)
    tree(tmp_path / "wrong", PLANTED["wrong"])
    asked = ["--device", "cpu", "--scope", "tiny", "--cases", "down/tiny/fp8", "--impl", "triton", "--gates"]
    assert commits.main(["run", "wrong", "bench.ops", *asked]) == 1
    shown = capfd.readouterr()
    assert "green: none" in shown.out and "rows 0: " in shown.err


@pytest.mark.slow
def test_right_ones_take_turns_and_others_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commits, "FOLDER", tmp_path)
    for name in ("a right one", "b right one", *PLANTED):
        tree(tmp_path / name, PLANTED.get(name))
    assert commits.main([*ASKED, "--turns", "2", "--patience", "40"]) == 1
    shown = capsys.readouterr().out
    lines = {re.split(" {2,}", line)[1]: line for line in shown.splitlines() if "down/" in line}
    assert lines.keys() == {"a right one", "b right one", *PLANTED}
    assert "1.000x" in lines["a right one"] and lines["b right one"].rstrip().endswith("x")
    assert "rows 0: " in lines["wrong"]
    assert "no answer in 40 s" in lines["endless"]
    assert "its process ended with 7" in lines["dead"]


def test_cases_for_which_there_is_no_time_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commits, "FOLDER", tmp_path)
    (tmp_path / "74c8bc1").mkdir()
    started = mock.Mock()
    monkeypatch.setattr(commits.Commit, "started", started)
    assert commits.main([*ASKED, "--minutes", "0"]) == 1
    assert "time is up: fp8_linear_residual-down" in capsys.readouterr().err
    started.return_value.end.assert_called_once()


def test_a_commit_that_is_not_prepared_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commits, "FOLDER", tmp_path)
    with pytest.raises(SystemExit):
        commits.main(ASKED)
    assert "commits must be among those prepared, none; got" in capsys.readouterr().err
    (tmp_path / "74c8bc1").mkdir()
    with pytest.raises(SystemExit):
        commits.main([*ASKED, "74c8bc2"])
    assert "commits must be among those prepared, 74c8bc1; got 74c8bc2" in capsys.readouterr().err


def test_the_implementation_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        commits.main(["time", "--cases", "down/tiny/fp8"])
    assert "the following arguments are required: --impl" in capsys.readouterr().err


@pytest.mark.slow
def test_a_commit_that_is_not_there_is_not_prepared(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(commits, "FOLDER", tmp_path)
    assert commits.main(["prepare", "nothing-of-that-name", "--cases", "down/tiny/fp8"]) == 1
    assert "nothing-of-that-name" in capfd.readouterr().err
