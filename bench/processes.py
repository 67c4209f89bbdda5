"""Processes that compile kernels: their environment, and what they print, an object of JSON a line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bootstrap import ROOT

MOST_CHARACTERS = 2000
"""Length of the end of a command's errors that is told."""


class CommandFailed(RuntimeError):
    """A command ended with another exit code than 0; the message has the end of its errors."""


def compiling(triton: Path | None) -> dict[str, str]:
    """The environment of a process that compiles: no interpreter, and Triton from a folder or the installed one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return kept | ({"PYTHONPATH": str(triton.resolve())} if triton else {})


def json_lines(command: Sequence[str], env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Run a command in the checkout's root, and yield each object as soon as its line is there.

    Raises:
        CommandFailed: After the last line, where the exit code is not 0.
    """
    # A compiler that fails prints more than a pipe holds, which nobody empties meanwhile.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
        if code := process.wait():
            errors.seek(0)
            raise CommandFailed(f"{' '.join(command[1:4])} ended with {code}:\n{errors.read()[-MOST_CHARACTERS:]}")
