"""Options that several commands take, and the reading of their values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from happyhorse_fast.config import ModelConfig

PresetOption = Annotated[
    str | None,
    typer.Option(help=f"What the checkpoint is of, one of {', '.join(ModelConfig.preset_names())}; or --config."),
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="JSON file with the fields of ModelConfig, in place of --preset.")
]
DeviceOption = Annotated[str, typer.Option(help="Such as cuda, cuda:1 or cpu; auto: cuda where there is one.")]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        help="Of the fast forms: attention in bf16, int8_qk, int8_qk_fp8_v or fp8; left out, FastConfig's default."
    ),
]

ShardOption = Annotated[
    bool,
    typer.Option(
        "--shard-weights", help="Of several processes: each keeps a share of the weights, for cards too small for all."
    ),
]


def given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of some options that stand on the command line, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


def read_config(path: Path | None) -> ModelConfig | None:
    """Read a configuration from a JSON file of :meth:`ModelConfig.to_dict`.

    Raises:
        ValueError: The file is not a JSON object with the fields of a configuration; names the file.
    """
    if path is None:
        return None
    from happyhorse_fast.checkpoint.header import parse_json

    try:
        return ModelConfig(**parse_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"config {path}: {error}") from error


def shards(mesh: Any, shard_weights: bool) -> Any:
    """The mesh that weights are spread over; None where each process keeps all.

    Raises:
        ValueError: There is one process.
    """
    if shard_weights and mesh is None:
        raise ValueError("--shard-weights must come with several processes, which torchrun starts; this is one")
    return mesh if shard_weights else None


def usable_device(name: str) -> str:
    """Resolve ``auto``; return other names as they are.

    Raises:
        ValueError: This machine does not have it.
    """
    import torch

    from happyhorse_fast.checkpoint import load as checkpoint

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint.usable_device(name)
    return name
