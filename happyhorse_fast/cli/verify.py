"""``happyhorse-fast verify``: recorded cases, a checkpoint, fast forms, kernels and clips against their references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.cli.options import ConfigOption, DeviceOption, PresetOption, read_config, usable_device
from happyhorse_fast.cli.output import JsonOption, emit, literal, plain, table, verdict
from happyhorse_fast.errors import require_whole
from happyhorse_fast.files import require_target

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from happyhorse_fast.cli.checks import Comparison, Measurement
    from happyhorse_fast.cli.equivalence import Equivalence
    from happyhorse_fast.cli.fidelity import Fidelity
    from happyhorse_fast.model.calibration import Calibration
    from happyhorse_fast.model.fast_config import FastConfig
    from happyhorse_fast.ops.self_check import KernelCheck
    from happyhorse_fast.reference.model import HappyHorse


# Options that mean something in one mode alone.
_FAST, _PONY, _CALIBRATE, _CHECKPOINT = "--fast", "--pony", "--calibrate", "a checkpoint"
_BELONGS = {
    "clips": (_PONY,),
    "quick": (_PONY,),
    "precision": (_FAST,),
    "attention": (_FAST,),
    "top_k": (_FAST,),
    "steps": (_FAST, _CALIBRATE),
    "backend": (_FAST,),
    "out": (_CALIBRATE,),
    "most": (_CALIBRATE,),
    "force": (_CALIBRATE,),
    "calibrate": (_CHECKPOINT,),
    "preset": (_CHECKPOINT,),
    "config": (_CHECKPOINT,),
    "grid": (_CHECKPOINT,),
    "text": (_CHECKPOINT,),
    "seed": (_CHECKPOINT,),
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
    attention: Annotated[
        str | None, typer.Option(help="With --fast: attention in bf16, int8_qk or fp8; left out, FastConfig's default.")
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Of a checkpoint's inputs.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure errors layer by layer; exit code 1 where one is past its budget.

    Without a checkpoint: the eager model against outputs recorded from the public implementation, samplers included
    (relative L2 at most 1e-5 in float32, 2e-2 in bfloat16, 1e-4 for samplers). With one: its float32 and bfloat16
    against float64 on seeded inputs.

    --fast, on the recorded cases or a checkpoint: eager bf16, fast bf16, fast int8 or fp8 and fast with --top-k against
    eager float32, so that what kernels, 8 bits and sparsity cost shows separately; and attention alone in every format,
    layer by layer, beside the bound that decides its softmax. Budget: fast bf16 within 2x of eager bf16's own error;
    int8 and fp8 are stated, and fail only past 0.3.

    --calibrate, on a checkpoint: every op of every layer in bf16, int8 and e4m3 against float32 on the same inputs, at
    every step of clips that are sampled in bf16. Writes ranges and errors, and which ops int8 and fp8 should skip. Exit
    code 1 where bf16 itself is past --most: skipping does not help there.

    --kernels: the self-check of every kernel that "auto" relies on, run now.

    --pony: pictures, sound and times of impacts against float32's clip of the same noise, on the CPU; 5 minutes of one
    core, --quick 2. Budget: fast bf16's latents within 2x of eager bf16's own error at the median; int8
    and fp8 are stated, and fail only below 40 and 30 dB.
    """
    there = {_FAST: fast, _PONY: pony, _CALIBRATE: calibrate is not None, _CHECKPOINT: checkpoint is not None}
    for name, modes in _BELONGS.items():
        source = context.get_parameter_source(name)
        if not any(there[mode] for mode in modes) and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} must come with {' or '.join(modes)}, got none")
    if device not in ("auto", "cpu") and not (fast or kernels or checkpoint is not None):
        raise ValueError(f"--device must be left out, got {device!r}: the recorded cases and --pony run on the CPU")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if calibrate is not None:
        require_whole("calibrate", calibrate, 1)
        require_whole("steps", steps, 1)
        if most is not None and not 0 < most <= 1:
            raise ValueError(f"most must be above 0 and at most 1, got {most}")
        require_target(out, force)
    where = usable_device(device)
    data: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    equivalences: list[Equivalence] = []
    checked: list[KernelCheck] = []
    if kernels:
        checked = check_kernels(where)
        data["kernels"] = checked
    fidelity: Fidelity | None = None
    broken: list[str] = []
    if pony:
        fidelity, broken = _pony(clips, quick)
        data["pony"] = {**plain(fidelity), "violations": broken}
    if fast:
        from happyhorse_fast.ops.dispatch import BackendError

        towards = _fast_config(precision, attention, top_k, backend, where)
        try:
            equivalences = _equivalences(checkpoint, preset, config, towards, grid, text, seed, steps, where, as_json)
        except BackendError as error:
            raise ValueError(str(error)) from error
        data["equivalence"] = equivalences
    calibration: Calibration | None = None
    if calibrate is not None and checkpoint is not None:
        import torch

        from happyhorse_fast.cli import calibration as calibrating

        model = _load(checkpoint, preset, config, where, torch.bfloat16, as_json)
        how: dict[str, Any] = {"grid": grid, "text": text, "steps": steps, "seed": seed, "most": most}
        calibration = calibrating.calibrate(model, calibrate, **how, checkpoint=str(checkpoint), report=_say)
        calibrating.write(calibration, out)
        data["calibration"] = calibration
    if recorded or not (fast or kernels or pony or calibration):
        from happyhorse_fast.cli import checks

        comparisons = checks.verify_golden() if recorded or checkpoint is None else []
        if checkpoint is not None and not fast:
            import torch

            model = _load(checkpoint, preset, config, where, torch.float64, as_json)
            comparisons += checks.verify_model(model, grid, text=text, seed=seed)
        data["cases"] = [_as_data(c) for c in comparisons]
    verdicts = [c.passed for c in comparisons] + [e.passed for e in equivalences] + [c.passed for c in checked]
    passed = all(verdicts) and not broken and not (calibration and calibration.coarse)

    def render(console: Console) -> None:
        if comparisons:
            _render(console, comparisons)
        if equivalences:
            from happyhorse_fast.cli import equivalence_tables

            equivalence_tables.render(console, equivalences)
        if checked:
            _render_kernels(console, checked, where)
        if fidelity is not None:
            _render_pony(console, data["pony"])
        if calibration is not None:
            from happyhorse_fast.cli import calibration_tables

            calibration_tables.render(console, calibration, out)

    emit({"passed": passed, **data}, as_json, render)
    if not passed:
        raise typer.Exit(1)


def check_kernels(device: str) -> list[KernelCheck]:
    """Run the self-check of every kernel on a device, whatever is remembered of it; progress on standard error.

    Raises:
        ValueError: Triton kernels cannot run there.
    """
    import torch

    from happyhorse_fast.ops.dispatch import triton_obstacle
    from happyhorse_fast.ops.self_check import run_checks

    where = torch.device(device)
    obstacle = triton_obstacle(where)
    if obstacle is not None:
        raise ValueError(f"--kernels needs a device that runs Triton kernels: {obstacle}")
    # e4m3 in hardware: compute capability 8.9; the interpreter has every format.
    fp8 = where.type != "cuda" or torch.cuda.get_device_capability(where) >= (8, 9)
    found = []
    for check in run_checks("triton", where, fp8=fp8):
        print(f"{check.op} {check.variant}: {check.seconds:.1f} s", file=sys.stderr)
        found.append(check)
    return found


def _render_kernels(console: Console, checked: list[KernelCheck], device: str) -> None:
    rows: list[list[Any]] = [[c.op, c.variant, c.detail, f"{c.seconds:.1f}", verdict(c.passed)] for c in checked]
    console.print(
        table(
            f"kernels against their reference, on {device}",
            ["op", "format", "found", "s", ""],
            rows,
            left=2,
            folded=[2],
        )
    )
    if device == "cpu":
        note = "Run by Triton's interpreter, made exact: it shows what a kernel computes, not how a GPU rounds."
        console.print(literal(note))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _pony(clips: int, quick: bool) -> tuple[Fidelity, list[str]]:
    import torch

    from happyhorse_fast.cli import fidelity

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small several threads wait for each other
    try:
        chosen = fidelity.policies(quick=quick)
        found = fidelity.measure_fidelity(chosen, clips, progress=_say)
    finally:
        torch.set_num_threads(threads)
    return found, list(fidelity.violations(found))


def _render_pony(console: Console, found: dict[str, Any]) -> None:
    from happyhorse_fast.cli import fidelity_tables

    console.print(table(fidelity_tables.title(found), fidelity_tables.COLUMNS, fidelity_tables.rows(found)))
    console.print(literal(fidelity_tables.NOTE))
    for violation in found["violations"]:
        console.print(literal((violation, "red")))


def _fast_config(precision: str, attention: str | None, top_k: float | None, backend: str, device: str) -> FastConfig:
    from happyhorse_fast.model.fast_config import FastConfig, TopK

    if backend == "auto" and not device.startswith("cuda"):
        backend = "reference"
    return FastConfig(
        precision=precision,  # type: ignore[arg-type]  # FastConfig checks them and names what is allowed
        attention=attention,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        sparsity=None if top_k is None else TopK(top_k),
    )


def _equivalences(
    checkpoint: Path | None,
    preset: str | None,
    config: Path | None,
    fast: FastConfig,
    grid: tuple[int, int, int],
    text: int,
    seed: int,
    steps: int,
    device: str,
    quiet: bool,
) -> list[Equivalence]:
    import torch

    from happyhorse_fast.cli.checks import seeded_inputs
    from happyhorse_fast.cli.equivalence import equivalence, equivalence_golden

    if checkpoint is None:
        return equivalence_golden(fast, steps=steps, device=device)
    model = _load(checkpoint, preset, config, device, torch.float32, quiet)
    inputs = seeded_inputs(model.config, grid, text=text, seed=seed, device=model.device)
    return [equivalence(model, inputs, checkpoint.name, fast, steps=steps, seed=seed)]


def _load(
    checkpoint: Path, preset: str | None, config: Path | None, device: str, dtype: torch.dtype, quiet: bool
) -> HappyHorse:
    from happyhorse_fast.model.checkpoint import load
    from happyhorse_fast.model.packed_checkpoint import is_packed

    if is_packed(checkpoint):
        raise ValueError(f"checkpoint must hold the published weights to be verified; {checkpoint} holds packed ones")
    return load(checkpoint, preset, read_config(config), device=device, compute_dtype=dtype, progress=not quiet)


def _as_data(comparison: Comparison) -> dict[str, Any]:
    worst = comparison.worst()
    return {
        "name": comparison.name,
        "dtype": comparison.dtype,
        "passed": comparison.passed,
        "skipped": comparison.skipped,
        "worst": worst,
        "measurements": comparison.measurements,
    }


_COLUMNS = {
    "sequence": "sequence",
    "worst layer": "layer",
    "video": "out.video",
    "audio": "out.audio",
    "sampler": "sampler",
}


def _render(console: Console, comparisons: list[Comparison]) -> None:
    rows: list[list[Any]] = []
    for c in comparisons:
        cells = [_cell(c.worst(prefix), name == "worst layer") for name, prefix in _COLUMNS.items()]
        budgets = [f"{max(group):.0e}" if (group := _budgets(c, prefix)) else "" for prefix in ("out.", "sampler.")]
        rows.append([c.name, *cells, *budgets, literal(("skipped", "yellow")) if c.skipped else verdict(c.passed)])
    console.print(table("relative L2 error", ["case", *_COLUMNS, "model budget", "sampler budget", ""], rows))
    for c in comparisons:
        for m in c.measurements:
            if not m.passed:
                console.print(literal((f"{c.name}: {m.what} is off by {m.error:.2e}, budget {m.budget:.0e}", "red")))
        if c.skipped:
            console.print(literal((f"{c.name}: {c.skipped}", "yellow")))
        if any(m.cosine is not None for m in c.measurements):
            console.print(_layer_table(c))


def _budgets(comparison: Comparison, prefix: str) -> list[float]:
    return [m.budget for m in comparison.measurements if m.what.startswith(prefix)]


def _cell(measurement: Measurement | None, with_name: bool) -> str:
    if measurement is None:
        return ""
    return f"{measurement.error:.1e}" + (f" ({measurement.what})" if with_name else "")


def _layer_table(comparison: Comparison) -> Any:
    by_place: dict[str, dict[str, Measurement]] = {}
    for m in comparison.measurements:
        place, _, modality = m.what.rpartition(".")
        by_place.setdefault(place, {})[modality] = m
    rows = [
        [
            place,
            *(f"{v:.2e}" for v in (pair["video"].error, pair["audio"].error)),
            *(f"{1 - (pair[m].cosine or 0):.1e}" for m in pair),
        ]
        for place, pair in by_place.items()
    ]
    return table(comparison.name, ["after", "video", "audio", "1 - cosine, video", "1 - cosine, audio"], rows)
