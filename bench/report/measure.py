"""Measure what the report shows without a GPU, to be committed: errors, memory, launches, clips of the pony.

python -m bench.report.measure             # 9 minutes of one core; then `make report`
python -m bench.report.measure pony        # what depends on the pony's weights alone: 6 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.report.data import CALIBRATION, EQUIVALENCE, FIDELITY, MEMORY
from bench.results import COMMIT_VARIABLE, ROOT, Json, commit, describe_machine
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import layer_kind
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision, TopK, default_attention
from happyhorse_fast.fast.launches import launches_per_layer
from happyhorse_fast.fast.memory import StorageMeter, one_layer_per_kind, peak_by_kind, peak_memory, weight_bytes
from happyhorse_fast.fast.state import is_accelerated
from happyhorse_fast.json_data import plain
from happyhorse_fast.pony.generate import CLIP
from happyhorse_fast.pony.weights import load_model, weights_digest
from happyhorse_fast.tokens import tokens_for
from happyhorse_fast.verify.calibration import calibrate
from happyhorse_fast.verify.equivalence import equivalence_golden
from happyhorse_fast.verify.fidelity import measure_fidelity, policies
from happyhorse_fast.verify.forms import FORMS, Form

EVALUATE = ROOT / "examples" / "pony" / "evaluate.py"
PONY_CLIPS = 64
"""Every held-out prompt: under 26 policies two hours of one core."""
EIGHT_BITS: dict[Precision, AttentionPrecision] = {"int8": "int8_qk", "fp8": "fp8"}
"""Precisions whose errors are measured, with that of attention: every op in 8 bits of its kind."""
SHOWN = FORMS[1:]
"""The forms that somebody would run the full model in."""
CLIPS = (
    ("happyhorse-1.0-15b", "1080p", 5),
    ("happyhorse-1.0-15b", "1080p", 15),
    ("davinci-magihuman", "256p", 5),
    ("davinci-magihuman-sr-1080p", "1080p", 5),
)
_GIB = 2**30


def measure_equivalence() -> Json:
    """Every form on the recorded cases, attention in 8 bits as well; in backend reference on the CPU.

    int8 goes by the same way as fp8, from fast bf16 on, and stands before it; sparsity is that of fp8.
    """
    int8, fp8 = (
        plain(equivalence_golden(FastConfig(precision=p, attention=a, sparsity=TopK(0.25), backend="reference")))
        for p, a in EIGHT_BITS.items()
    )
    for case, also in zip(fp8, int8, strict=True):
        case["forms"][2:2] = [form for form in also["forms"] if form["form"] == "fast int8"]
        for form in case["forms"]:
            form["attention"] = next((a for p, a in EIGHT_BITS.items() if p in form["form"]), "bf16")
    return {**describe_machine(torch.device("cpu")), "equivalence": fp8}


def measure_memory() -> Json:
    """Peaks of whole models, live bytes along one layer of each kind, and launches; under fake tensors."""
    return {
        **describe_machine(torch.device("cpu")),
        "attention": {precision: default_attention(precision) for precision in ("bf16", "int8", "fp8")},
        "peaks": [_peak(form, *clip) for clip in CLIPS for form in SHOWN],
        "timelines": [_timeline(form, *CLIPS[0]) for form in SHOWN],
        "launches": [_launches(p, masks) for p in ("bf16", *EIGHT_BITS) for masks in (None, TopK(0.25))],
    }


def _peak(form: Form, preset: str, resolution: str, seconds: int) -> Json:
    config, clip = ModelConfig.preset(preset), tokens_for(resolution, "16:9", seconds, 24)
    return {
        "preset": preset,
        "resolution": resolution,
        "seconds": seconds,
        "form": form.name,
        "peak_gib": peak_by_kind(config, clip, form.without_weights) / _GIB,
        "weights_gib": weight_bytes(form.without_weights(config)) / _GIB,
    }


class _Timeline(StorageMeter):
    """Notes the bytes that are live after every operation that changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.after: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not self.after or self.live_bytes != self.after[-1]:
            self.operations.append(func._schema.name.split("::")[-1].removesuffix("_reference"))
            self.after.append(self.live_bytes)
        return out


def _timeline(form: Form, preset: str, resolution: str, seconds: int) -> Json:
    config, clip = ModelConfig.preset(preset), tokens_for(resolution, "16:9", seconds, 24)
    shallow = one_layer_per_kind(config, clip)
    layers: list[Json] = []

    def run(model: Any, *inputs: torch.Tensor) -> None:
        timeline = _Timeline()
        weights = timeline.register((*model.parameters(), *model.buffers()), "weights")
        timeline.register(inputs, "inputs")
        if is_accelerated(model):
            for state in model.fast.clips.values():
                timeline.register(state.tensors(), "clip state")
        marks: list[int] = []
        for layer in model.block.layers:
            layer.register_forward_pre_hook(lambda *_: marks.append(len(timeline.after)))
            layer.register_forward_hook(lambda *_: marks.append(len(timeline.after)))
        with timeline:
            model(*inputs)
        for index, (first, end) in enumerate(zip(marks[::2], marks[1::2], strict=True)):
            kind, operations = layer_kind(shallow, index, clip), timeline.operations[first:end]
            live = [(live - weights) / _GIB for live in timeline.after[first:end]]
            layers.append({"kind": kind, "operations": operations, "activations_gib": live})

    peak_memory(form.without_weights(shallow), clip, call=run)
    weights = weight_bytes(form.without_weights(config)) / _GIB
    clip_of = {"preset": preset, "resolution": resolution, "seconds": seconds}
    return {**clip_of, "form": form.name, "weights_gib": weights, "layers": layers}


def _launches(precision: Any, sparsity: TopK | None) -> Json:
    found = launches_per_layer(FastConfig(precision=precision, sparsity=sparsity))
    counts = [len(names) for names in found]
    ours = [sum(name.startswith("happyhorse_fast::") for name in names) for names in found]
    masks = "exact" if sparsity is None else "dynamic (top-k)"
    return {
        "precision": precision,
        "masks": masks,
        "fewest": min(counts),
        "most": max(counts),
        "ours": max(ours),
    }


def measure_pony() -> None:
    """Fidelity, ranges of activations, and how often clips are right; the contact sheets with it."""
    header = describe_machine(torch.device("cpu"))
    found = measure_fidelity(policies(), PONY_CLIPS, progress=print)
    write(FIDELITY, header | plain(found))
    clip = (CLIP.frames, CLIP.rows, CLIP.columns)
    ranges = calibrate(load_model(torch.bfloat16), 1, grid=clip, text=CLIP.text, report=print, progress=False)
    write(CALIBRATION, header | {"weights": weights_digest()} | plain(ranges))
    results = EVALUATE.parent / "results"
    for extra in ([], ["--image"]):
        folder = results / "image" if extra else results
        subprocess.run([sys.executable, str(EVALUATE), *extra, "--out", str(folder)], check=True)


def rounded(value: Any) -> Any:
    """Floats to five significant digits: what the report shows is rounded from them once, in two fifths of the size."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: Path, data: Json) -> None:
    """One JSON file, a line per top-level list item so that a change reads as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in rounded(data).items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            parts.append(f" {json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


PARTS: dict[str, Callable[[], None]] = {
    "memory": lambda: write(MEMORY, measure_memory()),
    "equivalence": lambda: write(EQUIVALENCE, measure_equivalence()),
    "pony": measure_pony,
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all of them")
    options = parser.parse_args()
    chosen = options.parts
    if unknown := set(chosen) - PARTS.keys():
        parser.error(f"part must be one of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    sources = commit()
    if sources.endswith("-dirty"):
        parser.error(f"sources must be committed first, for the results to name them ({sources})")
    os.environ[COMMIT_VARIABLE] = sources  # the first file that is written is no change of the sources
    torch.set_num_threads(1)
    for part in chosen or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
