"""Run one layer of the small model through the Triton kernels in Triton's interpreter, without a GPU.

Whether kernels are interpreted is decided when they are imported, so this takes a process of its own::

    python -m happyhorse_fast.verify.interpreted_layer "a large red ball bounces twice" 0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from happyhorse_fast.budgets import measure
from happyhorse_fast.eager import sequence
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, Precision
from happyhorse_fast.fast.state import build_clip_state
from happyhorse_fast.ops.runtime.obstacles import triton_missing
from happyhorse_fast.ops.runtime.op_checks import CODE_DISTANCE, DISTANCE
from happyhorse_fast.pony import load_model
from happyhorse_fast.pony.generate import noise_and_text
from happyhorse_fast.verify.layer_ops import record_inputs

LAYER = 1
"""Shared weights, SwiGLU7 and a window of frames, as most layers of the full model."""


@dataclass(frozen=True)
class LayerCheck:
    """The layer in one precision.

    Attributes:
        precision: ``"bf16"``, ``"int8"`` or ``"fp8"``.
        relative_l2: Of what the layer adds to the residual stream, kernels against plain torch.
        tile_distance: Worst 128 x 128 tile of it.
        to_float32: Relative L2 of the kernels' result to eager float32: what the precision costs.
        passed: Whether the worst tile is within its budget.
        seconds: In the interpreter; says nothing about a GPU.
    """

    precision: Precision
    relative_l2: float
    tile_distance: float
    to_float32: float
    passed: bool
    seconds: float


Found = tuple[list[LayerCheck], str | None]
"""The checks, and the reason where there are none."""


@contextmanager
def interpreted_layer(prompt: str, seed: int) -> Iterator[Callable[[], Found]]:
    """Start the process; yields what waits for its checks. It is ended where nobody waits for it.

    Args:
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        seed: Of the noise that the layer's input is made of.
    """
    why_not = triton_missing()
    if why_not is not None:
        yield lambda: ([], f"{why_not}, so its interpreter cannot run a layer (it is for Linux only)")
        return
    with subprocess.Popen(
        [sys.executable, "-m", __name__, prompt, str(seed)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield partial(checks_of, process)
        finally:
            process.kill()


def checks_of(process: subprocess.Popen[str]) -> Found:
    """Wait for the process."""
    out, error = process.communicate()
    if process.returncode:
        last = (error.strip().splitlines() or ["no message"])[-1]
        return [], f"the layer did not run in Triton's interpreter: exit code {process.returncode}, {last}"
    return [LayerCheck(**entry) for entry in json.loads(out)], None


def run_layer(prompt: str, seed: int) -> list[LayerCheck]:
    """Run the layer in every precision, on its input in the first denoising step.

    Args:
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        seed: Of the noise.

    Raises:
        BackendError: Kernels are not interpreted in this process.
    """
    inputs = list(noise_and_text(prompt, torch.Generator().manual_seed(seed)))
    exact = load_model(torch.float32)
    given = record_inputs(exact, inputs)[LAYER]
    with torch.no_grad():
        layer = exact.block.layers[LAYER]
        after = layer(given.hidden, given.phases, given.clip, given.ranges, torch.float32)
    expected = after - given.hidden
    found = []
    budgets: dict[Precision, float] = {"bf16": DISTANCE, "int8": DISTANCE, "fp8": CODE_DISTANCE}
    for name, budget in budgets.items():
        start = time.perf_counter()
        plain, kernels = (_added_by_layer(given.hidden, inputs, name, backend) for backend in ("reference", "triton"))
        error = measure(kernels, plain)
        cost = measure(kernels, expected).relative_l2
        passed = error.finite and error.tile_distance <= budget
        seconds = time.perf_counter() - start
        found.append(LayerCheck(name, error.relative_l2, error.tile_distance, cost, passed, seconds))
    return found


def _added_by_layer(
    hidden: torch.Tensor, inputs: list[torch.Tensor], precision: Precision, backend: str
) -> torch.Tensor:
    """Return [N, C] that the fast layer adds to ``hidden`` [N, C], token rows in the public order."""
    model = load_model()
    video, audio, text = inputs
    clip = sequence.check_inputs(model.config, video, audio, text, model.device)
    fast = FastConfig(precision=precision, backend=backend, originals="drop")  # type: ignore[arg-type]
    accelerate(model, fast)
    state = build_clip_state(model.fast, clip, model.adapter.rope.bands)  # type: ignore[arg-type]
    rows = torch.zeros(state.rows.slots, hidden.shape[1])
    rows[state.token_rows] = hidden
    model.block.layers[LAYER](rows, state, None)
    return rows[state.token_rows] - hidden


def main() -> None:
    """Entry point of the process: prints the checks as JSON."""
    torch.set_num_threads(1)
    prompt, seed = sys.argv[1:]
    print(json.dumps([asdict(check) for check in run_layer(prompt, int(seed))]))


if __name__ == "__main__":
    main()
