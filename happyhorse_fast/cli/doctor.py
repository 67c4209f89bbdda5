"""``happyhorse-fast doctor``: list the hardware and software here, what will run, and why not more."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from happyhorse_fast import optional
from happyhorse_fast._version import __version__
from happyhorse_fast.cli.output import JsonOption, Shown, emit, table, verdict

# What each is for.
_OPTIONAL = {
    "diffusers": "UniPC steps: guided sampling, second stage",
    "matplotlib": "the contact sheet of `demo`",
    "av": "writing decoded clips, reading pictures",
    "transformers": "the text encoder: from a prompt to an mp4",
}


def doctor(as_json: JsonOption = False) -> None:
    """GPU, driver, torch, Triton, CUDA compilers, optional packages; what will run here, and why not more."""
    data = examine()
    emit(data, as_json, shown(data))


def examine() -> dict[str, Any]:
    """Collect what :func:`doctor` prints, as plain data."""
    import torch

    from happyhorse_fast.ops.runtime.cuda import status

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": gpu.total_memory / 2**30}
        for gpu in found
    ]
    cuda = status.examine()
    return {
        "package": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cuda_available": torch.cuda.is_available(),
        },
        "gpus": gpus,
        "driver": _first_match(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"[\d.]+"),
        "triton": optional.version_of("triton"),
        "nvcc": _nvcc(),
        "cuda_bindings": optional.version_of("cuda-bindings"),
        "cuda": cuda,
        "optional": {name: optional.version_of(name) for name in _OPTIONAL},
        "runs": [
            *_what_runs(gpus),
            _run("CUDA kernels", cuda["obstacle"], status.summary(cuda)),
            _run("host module", cuda["host_module"]["why"], "block maps in C++"),
        ],
    }


def _nvcc() -> dict[str, str] | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    if path is None:
        return None
    return {"path": path, "version": _first_match([path, "--version"], r"(?<=release )[\d.]+") or "unknown"}


def _first_match(command: list[str], pattern: str) -> str | None:
    """First match in a program's output; None where there is no such program, it fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):  # there, but not to be run, or without an answer
        return None
    match = re.search(pattern, done.stdout) if done.returncode == 0 else None
    return match.group() if match else None


def _run(what: str, obstacle: str | None, why: str) -> dict[str, Any]:
    """A line of what runs here, or of the obstacle to it."""
    return {"what": what, "runs": obstacle is None, "why": obstacle or why}


def _what_runs(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torch

    from happyhorse_fast.ops.runtime import obstacles
    from happyhorse_fast.verify.forms import FORMS

    place = f"on {gpus[0]['name']} and on the CPU" if gpus else "on the CPU; this torch sees no CUDA device"
    obstacle = obstacles.triton_obstacle(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    eager = [_run(f"{form.name} reference", None, place) for form in FORMS if not form.kernels]
    fast = []
    for form in (form for form in FORMS if form.kernels):
        checked = "Triton kernels, each after its self-check at the first accelerate"
        fast.append(_run(f"{form.name} kernels", obstacle, checked))
        oracle = "plain torch with the kernels' rounding: an oracle, not fast"
        fast.append(_run(f"{form.name} backend reference", None, oracle))
    packages = [_run(purpose, optional.obstacle(name), f"{name} imports") for name, purpose in _OPTIONAL.items()]
    return [*eager, *fast, *packages]


def shown(data: dict[str, Any]) -> Shown:
    """Lay out what :func:`examine` found."""
    torch_, nvcc = data["torch"], data["nvcc"]
    cuda = f"CUDA {torch_['cuda']}" if torch_["cuda"] else "built without CUDA"
    absent = "not found"
    binaries = data["cuda"]["binaries"]
    targets = sorted({target for of in data["cuda"]["targets"].values() for target in of})
    gpus = [f"{g['name']}, sm_{g['capability'].replace('.', '')}, {g['memory_gib']:.1f} GiB" for g in data["gpus"]]
    facts = {
        "happyhorse-fast": f"{data['package']}, Python {data['python']}, {data['system']}",
        "GPU": "; ".join(gpus) or absent,
        "driver": data["driver"] or absent,
        "torch": f"{torch_['version']}, {cuda}",
        "Triton": data["triton"] or absent,
        "nvcc": f"{nvcc['version']}, {nvcc['path']}" if nvcc else absent,
        "cuda-bindings": data["cuda_bindings"] or absent,
        "NVRTC": data["cuda"]["nvrtc"]["found"] or data["cuda"]["nvrtc"]["why"],
        "CUDA binaries": f"{', '.join(targets)}, {binaries['found']}" if binaries["found"] else binaries["why"],
        **{name: version or absent for name, version in data["optional"].items()},
    }
    yield from (f"{name:16} {value}" for name, value in facts.items())
    yield ""
    rows = [[verdict(r["runs"], "yes", "no", "yellow"), r["what"], r["why"]] for r in data["runs"]]
    yield table("what runs here", ["runs", "what", "why"], rows, left=2, folded=[2])
