"""What the report shows without a GPU, measured once and committed: errors of the fast forms, memory, launches.

python -m bench.report_measure      # 2 minutes on a CPU; then `make report`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.results import FOLDER, Json, describe_machine
from happyhorse_fast.cli.equivalence import equivalence_golden
from happyhorse_fast.cli.forms import FORMS, Form
from happyhorse_fast.cli.output import plain
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import layer_kind
from happyhorse_fast.model.fast_config import FastConfig, TopK
from happyhorse_fast.model.fast_state import is_accelerated
from happyhorse_fast.model.launches import launches_per_layer
from happyhorse_fast.model.memory import StorageMeter, one_layer_per_kind, peak_by_kind, peak_memory, weight_bytes
from happyhorse_fast.tokens import tokens_for

EQUIVALENCE = FOLDER / "equivalence"
MEMORY = FOLDER / "memory"
SHOWN = FORMS[1:]
"""The forms that somebody would run the full model in."""
CLIPS = (
    ("happyhorse-1.0-15b", "1080p", 5),
    ("happyhorse-1.0-15b", "1080p", 15),
    ("davinci-magihuman", "256p", 5),
    ("davinci-magihuman-sr-1080p", "1080p", 5),
)
TRACED = CLIPS[0]
_GIB = 2**30


def measure_equivalence() -> Json:
    """Every form on the recorded cases, in backend reference on the CPU."""
    fast = FastConfig(precision="fp8", sparsity=TopK(0.25), backend="reference")
    return {**describe_machine(torch.device("cpu")), "equivalence": plain(equivalence_golden(fast))}


def measure_memory() -> Json:
    """Peaks of whole models, live bytes along one layer of each kind, and launches; under fake tensors."""
    return {
        **describe_machine(torch.device("cpu")),
        "peaks": [_peak(form, *clip) for clip in CLIPS for form in SHOWN],
        "timelines": [_timeline(form, *TRACED) for form in SHOWN],
        "launches": [_launches(precision, masks) for precision in ("bf16", "fp8") for masks in (None, TopK(0.25))],
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
            layers.append(
                {
                    "kind": layer_kind(shallow, index, clip),
                    "operations": timeline.operations[first:end],
                    "activations_gib": [(live - weights) / _GIB for live in timeline.after[first:end]],
                }
            )

    peak_memory(form.without_weights(shallow), clip, call=run)
    weights = weight_bytes(form.without_weights(config)) / _GIB
    clip_of = {"preset": preset, "resolution": resolution, "seconds": seconds}
    return {**clip_of, "form": form.name, "weights_gib": weights, "layers": layers}


def _launches(precision: Any, sparsity: TopK | None) -> Json:
    counts = [len(names) for names in launches_per_layer(FastConfig(precision=precision, sparsity=sparsity))]
    masks = "exact" if sparsity is None else "dynamic (top-k)"
    return {"precision": precision, "masks": masks, "fewest": min(counts), "most": max(counts)}


def rounded(value: Any) -> Any:
    """Floats to four significant digits: what the report shows, in a third of the size."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


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


def main() -> None:
    """Measure and write both files."""
    torch.set_num_threads(1)
    write(MEMORY / "plan.json", measure_memory())
    write(EQUIVALENCE / "cpu.json", measure_equivalence())


if __name__ == "__main__":
    main()
