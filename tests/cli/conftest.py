"""What tests of several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from happyhorse_fast.cli import run

Json = Callable[..., dict[str, Any]]


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Json:
    def call(*arguments: object, code: int = 0) -> dict[str, Any]:
        assert run([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call
