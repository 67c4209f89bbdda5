"""``happyhorse-fast verify``: recorded cases, or a checkpoint, against the eager reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from happyhorse_fast.cli.options import ConfigOption, DeviceOption, PresetOption, read_config, usable_device
from happyhorse_fast.cli.output import JsonOption, emit, table

if TYPE_CHECKING:
    from rich.console import Console

    from happyhorse_fast.cli.checks import Comparison, Measurement


def verify(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder or file; none: the recorded cases.")
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    recorded: Annotated[bool, typer.Option("--golden", help="The recorded cases, besides a checkpoint.")] = False,
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
    """
    if checkpoint is None and (preset is not None or config is not None):
        raise ValueError("preset and config must come with a checkpoint, got none")
    from happyhorse_fast.cli import checks

    comparisons = checks.verify_golden() if recorded or checkpoint is None else []
    if checkpoint is not None:
        import torch

        from happyhorse_fast.model.checkpoint import load

        model = load(
            checkpoint,
            preset,
            read_config(config),
            device=usable_device(device),
            compute_dtype=torch.float64,
            progress=not as_json,
        )
        comparisons += checks.verify_model(model, grid, text=text, seed=seed)
    passed = all(c.passed for c in comparisons)
    data = {"passed": passed, "cases": [_as_data(c) for c in comparisons]}
    emit(data, as_json, lambda console: _render(console, comparisons))
    if not passed:
        raise typer.Exit(1)


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
    rows = []
    for c in comparisons:
        cells = [_cell(c.worst(prefix), name == "worst layer") for name, prefix in _COLUMNS.items()]
        budgets = [f"{max(group):.0e}" if (group := _budgets(c, prefix)) else "" for prefix in ("out.", "sampler.")]
        verdict = "[yellow]skipped[/]" if c.skipped else "[green]pass[/]" if c.passed else "[bold red]FAIL[/]"
        rows.append([c.name, *cells, *budgets, verdict])
    console.print(table("relative L2 error", ["case", *_COLUMNS, "model budget", "sampler budget", ""], rows))
    for c in comparisons:
        for m in c.measurements:
            if not m.passed:
                console.print(f"[red]{c.name}: {m.what} is off by {m.error:.2e}, budget {m.budget:.0e}[/]")
        if c.skipped:
            console.print(f"[yellow]{c.name}: {c.skipped}[/]")
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
