"""The committed results as the report shows them: what is verified, what of a roofline is reached, what fits a card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.cases import cases
from bench.measure.roofline import MEASURED, Peaks
from bench.peers.registry import PEERS
from bench.results import FOLDER, ROOT, Json, merged, read
from bench.sampler_runs import EXACT, MODES, SECOND_STAGE
from happyhorse_fast.fast.config import default_attention

EQUIVALENCE, MEMORY = FOLDER / "equivalence" / "cpu.json", FOLDER / "memory" / "plan.json"
FIDELITY, CALIBRATION = FOLDER / "pony" / "fidelity.json", FOLDER / "pony" / "calibration.json"
RATES = (ROOT / "examples/pony/results/rates.json", ROOT / "examples/pony/results/image/rates.json")
"""Shares of the pony's clips that are right: from a prompt, and from a prompt and a first picture."""


@dataclass(frozen=True)
class Report:
    """Everything committed.

    Attributes:
        gpu: Results of GPUs by the path of their newest file, the newest last; all files of a GPU are one.
        equivalence: Errors of every form.
        memory: The memory plan.
        rates: How often the pony's clips are right.
        fidelity: What precision and sparsity cost the pony.
        calibration: Ranges of its activations, and what every op of every layer loses.
    """

    gpu: dict[Path, Json]
    equivalence: Json
    memory: Json
    rates: list[Json]
    fidelity: Json
    calibration: Json

    @property
    def cases(self) -> list[Json]:
        """Every case whose errors were measured."""
        return list(self.equivalence["equivalence"])

    @property
    def newest(self) -> tuple[Path, Json]:
        """The newest GPU's item of :attr:`gpu`."""
        return list(self.gpu.items())[-1]


def load(gpus: Path = FOLDER) -> Report:
    """Read the committed results; those of GPUs are validated.

    Args:
        gpus: Folder that the results of GPUs lie below.

    Raises:
        ResultError: A GPU's file does not fit its format.
    """
    others = (json.loads(path.read_text()) for path in (EQUIVALENCE, MEMORY, *RATES, FIDELITY, CALIBRATION))
    equivalence, memory, *rates, fidelity, calibration = others
    return Report(gpu_results(gpus), equivalence, memory, rates, fidelity, calibration)


def gpu_results(folder: Path) -> dict[Path, Json]:
    """As :attr:`Report.gpu`, of the files below a folder, without what is told of cases and peers that are gone.

    Raises:
        ResultError: A file does not fit its format.
    """
    dated = folder.glob("*/????-??-??-*.json")
    of_gpu: dict[str, dict[Path, Json]] = {}
    for path in sorted(dated, key=lambda path: (path.name, path.parent.name)):
        data = read(path)
        if data["gpu"] != "cpu":  # a CPU's speed is nobody's question
            of_gpu.setdefault(data["gpu"], {})[path] = data
    gpu = {list(runs)[-1]: merged(list(runs.values())) for runs in of_gpu.values()}
    known = {case.name for scope in ("tiny", "small", "full") for case in cases(scope)}
    contestants = {*KERNELS, *(peer.name for peer in PEERS)}
    for data in gpu.values():
        data["entries"] = [entry for entry in data["entries"] if entry["case"] in known]
        data["absent"] = {what: why for what, why in data["absent"].items() if what.partition(" on ")[0] in contestants}
    return dict(sorted(gpu.items(), key=lambda item: item[0].name))


def ceilings(data: Json) -> list[Peaks]:
    """Ceilings of one GPU: the datasheet's first, then those measured; either where there is one."""
    stated = [Peaks(**peaks) for peaks in data.get("peaks", ()) if peaks["source"] != MEASURED]
    return [*stated, *filter(None, [measured_ceilings(data)])]


def measured_ceilings(data: Json) -> Peaks | None:
    """The most that was reached there: the library's products and a large copy, or a kernel that did better.

    The copy alone is no ceiling: on an H200 it moves 2.8 TB/s, and `rmsnorm_quantize` 4.2.
    """
    found = [Peaks(**peaks) for peaks in data.get("peaks", ()) if peaks["source"] == MEASURED]
    if not found:
        return None
    timed = [entry for entry in data["entries"] if entry["verified"] and entry["median_ms"] is not None]

    def best(name: str, precision: str) -> float:
        return max((entry[name] or 0.0 for entry in timed if entry["case"].endswith(precision)), default=0.0)

    newest = found[-1]
    return Peaks(
        max(newest.bandwidth, best("gbps", "") / 1e3),
        max(newest.bf16, best("tflops", "/bf16")),
        max(newest.fp8, best("tflops", "/fp8")) if newest.fp8 else None,
        MEASURED,
        int8=max(newest.int8 or 0.0, best("tflops", "/int8")) or None,
    )


def share_of(entry: Json, peaks: Peaks | None) -> float | None:
    """A verified entry's share of a roofline."""
    precision = entry["case"].rpartition("/")[2]
    return peaks.share(entry["tflops"] or 0.0, entry["gbps"] or 0.0, precision) if peaks else None


def verified(path: Path, data: Json) -> str:
    """Say in a sentence what was verified on a GPU.

    Args:
        path: Its newest result file; a folder of the same stem beside it may hold what ``python -m bench.checks self``
            printed, ``self-check.txt``.
        data: Its results.
    """
    whole = sum(entry["verified"] for entry in data["entries"])
    parts = [f"{whole} of {len(data['entries'])} pairs of op and kernel passed their gate against float64"]
    checks = path.with_suffix("") / "self-check.txt"
    if checks.is_file():
        lines = checks.read_text().splitlines()
        parts.append(f"{sum(': passed,' in line for line in lines)} of {len(lines)} self-checks passed")
    sizes = sorted({entry["case"].split("/")[1] for entry in data["entries"]})
    at = f" at {', '.join(sizes)}" if sizes else ""
    where = f"{data['gpu']}, commit {data['commit']}, torch {data['torch']}, Triton {data['triton']}"
    return f"Verified on {where}, driver {data['driver']}: {parts[0]}{at}{''.join(f'; {p}' for p in parts[1:])}."


def steps_timed(run: Json) -> int:
    """Count the steps of a sampler run that were timed: all, or as many as its note says."""
    part = next((part for part in (run.get("note") or "").split("; ") if part.endswith("steps timed")), None)
    return int(part.split()[0]) if part else int(run["steps"])


KERNELS = {"triton": "plain Triton", "hopper": "Gluon", "cuda": "CUDA", "reference": "plain torch"}
"""Names of kernels in tables, of ops as of a clip's attention."""


def mode_in_words(name: str) -> str:
    """A mode of the sampler with its precisions, and whether attention's is what the products' has by default."""
    mode = MODES.get(name)
    if mode is None or mode.precision in (None, "bf16"):
        return {"eager": "eager bf16", "torch.compile": "torch.compile, bf16"}.get(name, name)
    default = f" (the default of {mode.precision})" if mode.attention == default_attention(mode.precision) else ""
    return f"fast {mode.precision}, attention {mode.attention}{default}"


def form_of(run: Json) -> str:
    """A sampler run in words: what runs, the kernel of attention, the mask, the card."""
    kernel = run.get("attention") or run.get("backend") or ""
    parts = [mode_in_words(run["mode"]), KERNELS.get(kernel, kernel)]
    parts += [f"{run['mask']} of video pairs"] if run.get("mask", EXACT) != EXACT else []
    parts += [f"as a {run['cap_gb']} GB card"] if run.get("cap_gb") else []
    return ", ".join(filter(None, parts))


def total_of(run: Json) -> str:
    """Seconds of a clip; after ~ where not all of its steps were timed."""
    if run["total_s"] is None:
        return ""
    return f"{'~' if steps_timed(run) < run['steps'] else ''}{run['total_s']:.1f}"


PARTS = (
    ("attention", ("block_sparse_attention", "attention")),
    ("selection", ("select_blocks",)),
    ("proj + down", ("fp8_linear_residual",)),
    ("up", ("fp8_linear_activation",)),
    ("QKV", ("qkv_linear",)),
    ("norms", ("rmsnorm_quantize",)),
    ("row codes", ("quantize_rows",)),
    ("eager's products", ()),
    ("rest", ("other",)),
)
"""Parts that a step's seconds are split into, and the ops of a breakdown that count there."""


def parts_of(run: Json) -> dict[str, float]:
    """Seconds of a profiled step by :data:`PARTS`; empty where none was profiled."""
    spent = dict(run.get("breakdown") or {})
    if not spent:
        return {}
    found = {name: sum(spent.pop(op, 0.0) for op in ops) for name, ops in PARTS}
    # In a fast model "products" are the embedders and output heads alone.
    found["rest" if run["mode"].startswith("fast") else "eager's products"] += spent.pop("products", 0.0)
    found["rest"] += sum(spent.values())
    return {name: seconds for name, seconds in found.items() if seconds}


def clips(data: Json) -> list[Json]:
    """Runs of the sampler by clip, the slowest first; those that failed at the end.

    Of runs that differ only in how their kernels were asked for, the newest.
    """
    names = ("preset", "resolution", "seconds", "mode", "mask", "cap_gb", "attention")
    newest = {tuple(run.get(name) for name in names): run for run in data["sampler"]}
    return sorted(newest.values(), key=lambda run: (run["preset"] == SECOND_STAGE, -(run["total_s"] or 0.0)))
