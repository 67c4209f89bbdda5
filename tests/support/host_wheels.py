"""Hosts as they are published: `make check` installs them below .hosts/, without what they depend on."""

import json
import os
import subprocess
import sys
from pathlib import Path

from happyhorse_fast.hosts.versions import TESTED

ROOT = Path(__file__).parents[2]


def folder(host):
    path = ROOT / ".hosts" / f"{host}-{TESTED[host]}"
    assert (path / ".installed").is_file(), f"{host} is not there: make .hosts/{path.name}/.installed"
    return path


def run(host, *arguments, cwd, **environment):
    """What Python with these arguments printed last, from JSON, in a process that finds the host first."""
    known = {"PYTHONPATH": str(folder(host)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | known | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
