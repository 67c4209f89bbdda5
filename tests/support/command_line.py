"""The command line as tests call it."""

from __future__ import annotations

import pytest

from happyhorse_fast.cli import run


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert run([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("happyhorse-fast: error: ")
    assert err.count("\n") == 1, err
    return err
