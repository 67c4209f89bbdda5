"""What state the GPU is in when something is timed: clock, power, temperature and why the clock is held back."""

from __future__ import annotations

import functools
import shutil
import subprocess

import torch

from bench.results import Json

FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
    "clocks_throttle_reasons.active": "throttle",
}
TOOL = "nvidia-smi"


def read(device: torch.device) -> Json:
    """State of a GPU by its name in :data:`FIELDS`; empty on a CPU, or without nvidia-smi."""
    if device.type != "cuda" or shutil.which(TOOL) is None:
        return {}
    return _query(device.index or 0)


def around(before: Json, device: torch.device) -> Json:
    """``{"conditions": {"before": ..., "after": ...}}`` with the state of now; empty where it is not known."""
    after = read(device)
    return {"conditions": {"before": before, "after": after}} if after else {}


def _query(index: int) -> Json:
    fields = _known_fields()
    values: Json = {}
    for name, value in zip(fields, _ask(fields, index), strict=False):
        try:
            values[FIELDS[name]] = float(value)
        except ValueError:  # a mask, or what this card does not tell
            values[FIELDS[name]] = value
    return values


@functools.cache
def _known_fields() -> tuple[str, ...]:
    """What this nvidia-smi can be asked for; nothing where it does not answer in time, so that it is asked once."""
    every = tuple(FIELDS)
    return next((fields for fields in (every, every[:-1]) if _ask(fields, 0)), ())  # the last was renamed


def _ask(fields: tuple[str, ...], index: int) -> list[str]:
    if not fields:
        return []
    command = [TOOL, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
