"""Result files: one JSON per GPU and commit, rewritten whole after every entry, so that a cut run loses nothing.

    bench/results/<gpu>/<date>-<commit>.json
    {gpu, driver, torch, triton, commit, peaks, absent, stages, gates,
     entries: [{case, impl, median_ms, tflops, gbps, roofline, peers: {name: ms}, verified, ...}],
     sampler: [{preset, resolution, seconds, mode, steps, s_per_step, total_s, peak_memory_gib, ...}]}

A case whose correctness gate is red has ``verified`` false, its ``reason``, and null for every number.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast.files import replacing
from happyhorse_fast.optional import version_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench" / "results"
COMMIT_VARIABLE = "COMMIT"
"""Names the commit where the sources come without their history."""

Json = dict[str, Any]
_NUMBER = (int, float)
HEADER: dict[str, Any] = {"gpu": str, "driver": str, "torch": str, "triton": str, "commit": str}
ENTRY_NUMBERS, RUN_NUMBERS = ("median_ms", "tflops", "gbps", "roofline"), ("s_per_step", "total_s", "peak_memory_gib")
"""Null where there is none: of a red gate, of a run whose memory ran out."""
ENTRY: dict[str, Any] = {"case": str, "impl": str, "peers": dict, "verified": bool}
ENTRY |= dict.fromkeys(ENTRY_NUMBERS, _NUMBER)
ENTRY_EXTRA: dict[str, Any] = {
    "tflops_useful": _NUMBER,  # on the model's own FLOPs
    "low_ms": _NUMBER,  # a tenth of the calls are faster
    "high_ms": _NUMBER,  # and a tenth slower
    "clock": str,  # what measured it: "events", "graph" or "cpu"
    "reason": str,  # why there is no number
    "roofline_measured": _NUMBER,  # share of the ceilings measured on this machine, not of the datasheet's
    "span": str,  # in which it and its peers took turns; comparable are times of one span alone
    "sm_mhz": _NUMBER,  # clock in the span
    "power_w": _NUMBER,  # and power, medians
    "conditions": dict,  # clock, power and temperature at both ends of the span
    "softmax": str,  # of attention: the form that ran (bench.inputs.softmax); kernels before there were two had none
    "config": dict,  # launch configuration, where it is not the committed one
}
SAMPLER: dict[str, Any] = {"preset": str, "resolution": str, "seconds": int, "mode": str, "steps": int}
SAMPLER |= dict.fromkeys(RUN_NUMBERS, _NUMBER)
SAMPLER_EXTRA: dict[str, Any] = {
    "mask": str,  # "exact", or the share of video pairs
    "cap_gb": _NUMBER,  # size, as it is sold, of the card that memory was capped to
    "breakdown": dict,  # seconds of one step by op
    "backend": str,  # what was asked for; eager modes have none
    "attention": str,  # kernel that attention ran in: what "auto" took is not what it takes at another commit
    "softmax": str,  # form of attention's softmax in the layers (bench.inputs.softmax)
    "sm_mhz": _NUMBER,  # clock while the steps ran
    "power_w": _NUMBER,  # and power, medians
    "conditions": dict,  # clock, power and temperature before and after the steps
    "note": str,  # what was not run as published, or why there is no number
}


class ResultError(ValueError):
    """A result file does not hold what it must; the message names the field."""


def describe_machine(device: torch.device) -> Json:
    """The header of a result file."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": version_of("triton") or "none",
        "commit": commit(),
        **({"capability": "".join(map(str, torch.cuda.get_device_capability(device)))} if on_gpu else {}),
    }


def commit() -> str:
    """Short name of the sources' commit, with ``-dirty`` where files were changed; ``COMMIT`` without a history."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text()) if file.is_file() else None
    return found[0] if found else "unknown"


def path_for(header: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Path of this run's file: the newest of this GPU, commit and software that is there, else a new one."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(header["gpu"]).lower()).strip("-")
    begun = sorted((folder / gpu).glob(f"*-{header['commit']}*.json"), reverse=True)
    for path in begun:
        if not differences(read(path), header):
            return path
    again = f"-{len(begun) + 1}" if begun else ""
    return folder / gpu / f"{datetime.date.today().isoformat()}-{header['commit']}{again}.json"


def differences(data: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """List what keeps a file from being continued; drivers of a branch (580.159.03 and .04) are the same machine."""
    found = []
    for name in HEADER:
        theirs, ours = data[name], header[name]
        if name == "driver":
            theirs, ours = theirs.partition(".")[0], ours.partition(".")[0]
        if theirs != ours:
            found.append(f"{name} is {data[name]!r}, this run's is {header[name]!r}")
    return found


class Results:
    """A result file that is written as entries come; an entry takes the place of an earlier one of the same name.

    Args:
        path: The file; continued where it exists and is of the same machine and commit. None: entries are kept here
            alone.
        header: From :func:`describe_machine`.

    Raises:
        ResultError: The file exists and is of another machine or commit, or not a result file.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, dict(header)
        self.data: Json = {**header, "peaks": [], "absent": {}, "stages": [], "gates": [], "entries": [], "sampler": []}
        if path is not None and path.is_file():
            data = read(path)
            for difference in differences(data, header):
                raise ResultError(f"{path}: {difference}")
            drivers = dict.fromkeys([*data["driver"].split(", "), header["driver"]])
            self.data |= data | {"driver": ", ".join(drivers)}

    def add(self, name: str, entry: Json) -> None:
        """Put an entry into a list of :data:`KEYS`: a microbenchmark, a gate's verdict, a run, a stage, a ceiling."""
        self.data[name] = _joined(self.data[name], [entry], KEYS[name])
        self._write()

    def add_absent(self, peers: Mapping[str, str]) -> None:
        """Peers that are not there, with the reason."""
        self.data["absent"] |= peers
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        validate(self.data, str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, end=".partial") as partial:
            partial.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")


KEYS = {
    "entries": ("case", "impl"),
    "sampler": ("preset", "resolution", "seconds", "mode", "mask", "cap_gb", "steps", "backend", "attention"),
    "gates": ("case", "impl"),
    "stages": ("name",),
    "peaks": ("source",),
}
"""Fields that name an entry of each list: a later one of the same name takes its place."""


def merged(files: Sequence[Json]) -> Json:
    """Files of one GPU as one, oldest first: of what they share the newest counts, a gate that turned red included."""
    whole: Json = {}
    for data in files:
        lists = {name: _joined(whole.get(name, []), data.get(name, []), key) for name, key in KEYS.items()}
        whole = whole | data | lists | {"absent": whole.get("absent", {}) | data.get("absent", {})}
    for name in HEADER:
        whole[name] = ", ".join(dict.fromkeys(str(data[name]) for data in files))
    return whole


def refusal(entry: Json) -> str | None:
    """Say why an entry shows no number, its peers' included; None where it has one."""
    reason = entry.get("reason") or "its correctness gate is red"
    if not entry["verified"]:
        return f"not verified: {reason}"
    return f"no number: {reason}" if entry["median_ms"] is None else None


RENAMED = {"gluon": "hopper"}
"""Recorded name of a kernel -> its name now."""


def comparable(one: Json, other: Json) -> bool:
    """Tell whether the times of two entries are of one span: a cool chip's are up to 20 % below a warm one's."""
    return bool(one.get("span")) and one.get("span") == other.get("span")


def _joined(earlier: Sequence[Json], later: Sequence[Json], key: tuple[str, ...]) -> list[Json]:
    def name(entry: Json) -> tuple[Any, ...]:
        return tuple(entry.get(part) for part in key)

    replaced = {name(entry) for entry in later}
    return [*(entry for entry in earlier if name(entry) not in replaced), *later]


def read(path: Path) -> Json:
    """A validated result file.

    Raises:
        ResultError: It is not one; the message says what is wrong.
        FileNotFoundError: It is not there.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    validate(data, str(path))
    for entry in (*data["entries"], *data.get("gates", ()), *data["sampler"]):
        entry |= {name: RENAMED[entry[name]] for name in ("impl", "backend", "attention") if entry.get(name) in RENAMED}
    return dict(data)


def validate(data: Any, where: str) -> None:
    """Hold a file's content against the format.

    Raises:
        ResultError: The first field that does not fit.
    """
    extra = {"capability": str, "peaks": list, "absent": dict, "stages": list, "gates": list}
    _fields(data, HEADER | {"entries": list, "sampler": list}, extra, where)
    for i, entry in enumerate(data["entries"]):
        here = f"{where}: entries[{i}]"
        _fields(entry, ENTRY, ENTRY_EXTRA, here)
        if not entry["verified"] and (entry["median_ms"] is not None or entry["tflops"] is not None):
            raise ResultError(f"{here}: {entry['case']} is not verified, so it must have no number")
        if entry["verified"] and entry["median_ms"] is None and not entry.get("reason"):
            raise ResultError(f"{here}: {entry['case']} has neither a time nor a reason")
        for name, taken in entry["peers"].items():
            _number(taken, f"{here}: peers[{name!r}]")
    for i, gate in enumerate(data.get("gates", ())):
        _fields(gate, {"case": str, "impl": str, "passed": bool}, {}, f"{where}: gates[{i}]")
    for i, run in enumerate(data["sampler"]):
        _fields(run, SAMPLER, SAMPLER_EXTRA, f"{where}: sampler[{i}]")


def _fields(data: object, required: Mapping[str, Any], optional: Mapping[str, Any], where: str) -> None:
    if not isinstance(data, dict):
        raise ResultError(f"{where}: must be an object, got {type(data).__name__}")
    for name in required:
        if name not in data:
            raise ResultError(f"{where}: {name} is missing")
    for name, value in data.items():
        wanted = required.get(name, optional.get(name))
        if wanted is None:
            raise ResultError(f"{where}: {name} is not part of the format")
        if value is None and name in {*ENTRY_NUMBERS, *RUN_NUMBERS, *optional}:
            continue
        if wanted is _NUMBER:
            _number(value, f"{where}: {name}")
        elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise ResultError(f"{where}: {name} must be {wanted.__name__}, got {value!r}")


def _number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not math.isfinite(value) or value < 0:
        raise ResultError(f"{where} must be a finite number of at least 0, got {value!r}")
