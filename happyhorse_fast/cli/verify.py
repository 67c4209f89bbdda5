"""``happyhorse-fast verify``: recorded cases, a checkpoint, fast forms, kernels and clips against their references."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.arguments import require_whole
from happyhorse_fast.cli.options import (
    AttentionOption,
    ConfigOption,
    DeviceOption,
    PresetOption,
    given,
    read_config,
    usable_device,
)
from happyhorse_fast.cli.output import JsonOption, Shown, emit
from happyhorse_fast.fast.config import FastConfig, TopK
from happyhorse_fast.files import require_target
from happyhorse_fast.json_data import plain

if TYPE_CHECKING:
    import torch

    from happyhorse_fast.ops.runtime.self_check import KernelCheck

_FAST, _PONY, _CALIBRATE, _CHECKPOINT = "--fast", "--pony", "--calibrate", "a checkpoint"
# Options that mean something in some modes alone.
_BELONGS = {
    (_PONY,): ("clips", "quick"),
    (_FAST,): ("precision", "attention", "top_k", "backend"),
    (_FAST, _CALIBRATE): ("steps",),
    (_CALIBRATE,): ("out", "most", "force"),
    (_CHECKPOINT,): ("calibrate", "preset", "config", "grid", "text", "seed"),
}


def verify(
    context: typer.Context,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder or file; none: the recorded cases.")
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    recorded: Annotated[bool, typer.Option("--golden", help="The recorded cases, besides what else is asked for.")] = (
        False
    ),
    fast: Annotated[bool, typer.Option("--fast", help="What the fast forms lose, per op, per layer, end to end.")] = (
        False
    ),
    kernels: Annotated[bool, typer.Option("--kernels", help="Every kernel against its reference on this GPU.")] = False,
    pony: Annotated[
        bool, typer.Option("--pony", help="Clips of the small trained model under every precision and sparsity.")
    ] = False,
    clips: Annotated[int, typer.Option(help="With --pony: held-out prompts, 1 to 64.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="With --pony: the main policies alone.")] = False,
    calibrate: Annotated[
        int | None, typer.Option(help="Find what a checkpoint loses in int8 and e4m3, on so many clips.")
    ] = None,
    out: Annotated[Path, typer.Option(help="With --calibrate: the file for FastConfig.calibrated.")] = Path(
        "calibration.json"
    ),
    most: Annotated[
        float | None,
        typer.Option(
            help="With --calibrate: relative L2 from which an op is skipped; left out, 0.05 in int8, 0.1 in e4m3."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --calibrate: replace the file.")] = False,
    precision: Annotated[str, typer.Option(help="With --fast: bf16, int8 or fp8.")] = "fp8",
    attention: AttentionOption = None,
    top_k: Annotated[
        float | None, typer.Option(help="With --fast: also with this share of video blocks, such as 0.25.")
    ] = None,
    steps: Annotated[int, typer.Option(help="With --fast or --calibrate: denoising steps; 0 with --fast: none.")] = 8,
    backend: Annotated[
        str, typer.Option(help="With --fast: auto, triton, cuda or reference; auto on a CPU: reference.")
    ] = "auto",
    grid: Annotated[
        tuple[int, int, int], typer.Option(help="Token grid for a checkpoint: latent frames, rows, columns.")
    ] = (3, 4, 6),
    text: Annotated[int, typer.Option(help="Text tokens for a checkpoint.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of a checkpoint's inputs.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure errors layer by layer; exit code 1 where one is past its budget.

    Without a checkpoint: the eager model against outputs recorded from the public implementation, samplers included
    (relative L2 at most 1e-5 in float32, 2e-2 in bfloat16, 1e-4 for samplers). With one: its float32 and bfloat16
    against float64 on seeded inputs.

    --fast, on the recorded cases or a checkpoint: eager bf16, fast bf16, fast int8 or fp8 and fast with --top-k against
    eager float32, so that what kernels, 8 bits and sparsity cost shows separately. Budget: fast bf16 within 2x of eager
    bf16's own error; int8 and fp8 are stated, and fail only past 0.3.

    --calibrate, on a checkpoint: every op of every layer in bf16, int8 and e4m3 against float32 on the same inputs, at
    every step of clips that are sampled in bf16; of attention also the bound that decides its softmax. Writes ranges
    and errors, and which ops int8 and fp8 should skip. Exit code 1 where bf16 itself is past --most: skipping does not
    help there.

    --kernels: the self-check of every kernel that "auto" relies on, run now; with TRITON_INTERPRET=1 in the environment
    on a CPU, in Triton's interpreter.

    --pony: pictures, sound and times of impacts against float32's clip of the same noise, on the CPU; 5 minutes of one
    core, --quick 2. Budget: fast bf16's latents within 2x of eager bf16's own error at the median; int8
    and fp8 are stated, and fail only below 40 and 30 dB.
    """
    there = {_FAST: fast, _PONY: pony, _CALIBRATE: calibrate is not None, _CHECKPOINT: checkpoint is not None}
    for modes, names in _BELONGS.items():
        alone = given(context, names)
        if alone and not any(there[mode] for mode in modes):
            raise ValueError(f"{alone[0]} must come with {' or '.join(modes)}, got none")
    if device not in ("auto", "cpu") and not (fast or kernels or checkpoint is not None):
        raise ValueError(f"--device must be left out, got {device!r}: the recorded cases and --pony run on the CPU")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if checkpoint is not None:  # before minutes of loading
        for name, size in zip(("frames", "rows", "columns"), grid, strict=True):
            require_whole(f"{name} of grid", size, 1)
        require_whole("text", text, 1)
    if calibrate is not None:
        require_whole("calibrate", calibrate, 1)
        require_whole("steps", steps, 1)
        if most is not None and not 0 < most <= 1:
            raise ValueError(f"most must be above 0 and at most 1, got {most}")
        require_target(out, force)

    import torch

    from happyhorse_fast.checkpoint.load import load
    from happyhorse_fast.checkpoint.packed import is_packed
    from happyhorse_fast.cli import verify_tables
    from happyhorse_fast.verify import calibration, checks, equivalence, fidelity

    if checkpoint is not None and is_packed(checkpoint):
        raise ValueError(f"checkpoint must hold the published weights to be verified; {checkpoint} holds packed ones")
    where = usable_device(device)
    here = "reference" if backend == "auto" and not where.startswith("cuda") else backend
    towards = FastConfig(  # before minutes of --kernels and --pony
        precision=precision,  # type: ignore[arg-type]  # it checks them and names what is allowed
        attention=attention,  # type: ignore[arg-type]
        backend=here,  # type: ignore[arg-type]
        sparsity=None if top_k is None else TopK(top_k),
    )
    # Called where there is a checkpoint.
    eager = partial(load, str(checkpoint), preset, read_config(config), device=where, progress=not as_json)
    data: dict[str, Any] = {}
    passed: list[bool] = []
    shown: list[Shown] = []
    if kernels:
        checked = _check_kernels(torch.device(where))
        data["kernels"] = checked
        passed += [check.passed for check in checked]
        shown += [verify_tables.kernels(checked, where)]
    if pony:
        measured = fidelity.measure_fidelity(fidelity.policies(quick=quick), clips, progress=_say)
        data["pony"] = {**plain(measured), "violations": list(fidelity.violations(measured))}
        passed += [not data["pony"]["violations"]]
        shown += [verify_tables.fidelity(data["pony"])]
    if fast:
        if checkpoint is None:
            forms = equivalence.equivalence_golden(towards, steps=steps, device=where)
        else:
            model = eager(compute_dtype=torch.float32)
            inputs = checks.seeded_inputs(model.config, grid, text=text, seed=seed, device=model.device)
            forms = [equivalence.equivalence(model, inputs, checkpoint.name, towards, steps=steps, seed=seed)]
            del model
        data["equivalence"] = forms
        passed += [case.passed for case in forms]
        shown += [verify_tables.equivalences(forms)]
    if calibrate is not None:
        how: dict[str, Any] = {"grid": grid, "text": text, "steps": steps, "seed": seed, "most": most}
        model = eager(compute_dtype=torch.bfloat16)
        how |= {"checkpoint": str(checkpoint), "report": _say, "progress": not as_json}
        losses = calibration.calibrate(model, calibrate, **how)
        del model
        calibration.write(losses, out)
        data["calibration"] = losses
        passed += [not losses.coarse]
        shown += [verify_tables.calibration(losses, out)]
    unseen = checkpoint is not None and not fast and calibrate is None  # by what was asked for so far
    if recorded or unseen or not (fast or kernels or pony or calibrate is not None):
        cases = checks.verify_golden() if recorded or checkpoint is None else []
        if checkpoint is not None and not fast:
            cases += checks.verify_model(eager(compute_dtype=torch.float64), grid, text=text, seed=seed)
        data["cases"] = [{**plain(case), "passed": case.passed, "worst": case.worst()} for case in cases]
        passed += [case.passed for case in cases]
        shown += [verify_tables.comparisons(cases)]
    emit({"passed": all(passed), **data}, as_json, itertools.chain.from_iterable(shown))
    if not all(passed):
        raise typer.Exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check_kernels(device: torch.device) -> list[KernelCheck]:
    """The self-check of every Triton kernel, whatever is remembered of it."""
    import torch

    from happyhorse_fast.ops.runtime import self_check
    from happyhorse_fast.ops.runtime.obstacles import triton_obstacle

    obstacle = triton_obstacle(device)
    if obstacle is not None:
        raise ValueError(f"--kernels needs a device that runs Triton kernels: {obstacle}")
    # e4m3 in hardware: compute capability 8.9; the interpreter has every format.
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    checked = []
    for check in self_check.run_checks("triton", device, fp8=fp8):
        _say(f"{check.op} {check.variant}: {check.seconds:.1f} s")
        checked.append(check)
    return checked
