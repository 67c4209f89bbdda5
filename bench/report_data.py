"""The committed results as the report shows them: what is verified, what is slower than a peer, what fits a card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from bench.results import FOLDER, ROOT, Json, merged, read
from happyhorse_fast.costs import CONTEXT_BYTES, card_bytes

NOT_GPU = ("equivalence", "memory", "pony")
"""Folders below the results that hold other files than a GPU's."""
RATES = (ROOT / "examples/pony/results/rates.json", ROOT / "examples/pony/results/image/rates.json")
"""How often the pony's clips are right: from a prompt, and from a prompt and a first picture."""


@dataclass(frozen=True)
class Report:
    """Everything committed.

    Attributes:
        gpu: Results of GPUs by the path of their newest file, the newest last; all files of a GPU are one.
        equivalence: Files of error measurements by path.
        memory: The memory plan, None where there is none.
        rates: How often the pony's clips are right.
        fidelity: What precision and sparsity cost the pony, None where that is not measured.
        activations: Its ranges and attention maps, likewise.
    """

    gpu: dict[Path, Json]
    equivalence: dict[Path, Json]
    memory: Json | None
    rates: list[Json] = field(default_factory=list)
    fidelity: Json | None = None
    activations: Json | None = None

    @property
    def cases(self) -> list[Json]:
        """Every measured case of the error files."""
        return [case for data in self.equivalence.values() for case in data["equivalence"]]


def load(folder: Path = FOLDER) -> Report:
    """Read and validate the results below a folder, and the pony's rates beside its example.

    Raises:
        ResultError: A GPU's file does not fit its format.
    """
    files = sorted(folder.glob("*/*.json"), key=lambda path: (path.name, path.parent.name))  # names start with a date
    runs = {path: read(path) for path in files if path.parent.name not in NOT_GPU}
    of_gpu: dict[str, list[Path]] = {}
    for path, data in runs.items():
        if data["gpu"] != "cpu":  # a CPU's speed is nobody's question
            of_gpu.setdefault(data["gpu"], []).append(path)
    gpu = {paths[-1]: merged([runs[path] for path in paths]) for paths in of_gpu.values()}
    gpu = dict(sorted(gpu.items(), key=lambda item: item[0].name))
    equivalence = {path: json.loads(path.read_text()) for path in files if path.parent.name == "equivalence"}
    memory = [json.loads(path.read_text()) for path in files if path.parent.name == "memory"]
    pony = {path.stem: json.loads(path.read_text()) for path in files if path.parent.name == "pony"}
    rates = [json.loads(path.read_text()) for path in RATES if path.exists()]
    newest = memory[-1] if memory else None
    return Report(gpu, equivalence, newest, rates, pony.get("fidelity"), pony.get("activations"))


@dataclass(frozen=True)
class Row:
    """A microbenchmark as it is shown.

    Attributes:
        case: What was run.
        impl: On what.
        verdict: ``"fastest"``, ``"slower"``, ``"alone"`` (no peer ran) or ``"not verified"``.
        note: The verdict in words: the ratio to the best peer, or why there is no number.
        median_ms: None where it is not verified or did not run.
        tflops: On computed FLOPs.
        tflops_useful: On the model's own.
        gbps: Bytes moved per second.
        roofline: Share of the roofline.
        best: Name of the fastest peer.
        ratio: The best peer's time over this one's; below 1 it is slower.
    """

    case: str
    impl: str
    verdict: str
    note: str
    median_ms: float | None = None
    tflops: float | None = None
    tflops_useful: float | None = None
    gbps: float | None = None
    roofline: float | None = None
    best: str | None = None
    ratio: float | None = None


def row_of(entry: Json) -> Row:
    """An entry as it is shown; one that is not verified shows no number, its peers' included."""
    case, impl = entry["case"], entry["impl"]
    reason = entry.get("reason") or "its correctness gate is red"
    if not entry["verified"]:
        return Row(case, impl, "not verified", f"not verified: {reason}")
    taken = entry["median_ms"]
    if taken is None:
        return Row(case, impl, "not verified", f"no number: {reason}")
    numbers = (taken, entry["tflops"], entry.get("tflops_useful"), entry["gbps"], entry["roofline"])
    peers: dict[str, float] = entry["peers"]
    if not peers:
        return Row(case, impl, "alone", "no peer ran", *numbers)
    best = min(peers, key=lambda name: peers[name])
    ratio = peers[best] / taken
    if ratio < 1:
        return Row(case, impl, "slower", f"SLOWER than {best}: {ratio:.2f}x", *numbers, best, ratio)
    return Row(case, impl, "fastest", f"{ratio:.2f}x {best}", *numbers, best, ratio)


def rows_of(data: Json) -> list[Row]:
    """All microbenchmarks of a file; those that need attention first."""
    order = {"not verified": 0, "slower": 1, "alone": 2, "fastest": 3}
    return sorted(
        (row_of(entry) for entry in data["entries"]), key=lambda row: (order[row.verdict], row.case, row.impl)
    )


def fits(peak_gib: float, card_gb: int) -> bool:
    """Whether a clip whose tensors peak at ``peak_gib`` runs on a card of ``card_gb``."""
    return peak_gib * 2**30 + CONTEXT_BYTES <= card_bytes(card_gb)


def worst(form: Json, kind: str, modality: str, measure: str = "relative_l2") -> float | None:
    """Largest distance among a form's results: ``kind`` is ``layer``, ``velocity``, ``latent`` or ``op.<name>``.

    Returns:
        None where there is none, or one is not finite.
    """
    name = kind.removeprefix("op.")
    found = []
    for what, error in form["errors"].items():
        place, *middle, last = what.split(".")
        if last == modality and (middle[-1:] == [name] if kind.startswith("op.") else place == kind):
            found.append(error[measure])
    if not found or any(value is None for value in found):
        return None
    return float(min(found) if measure == "psnr_db" else max(found))
