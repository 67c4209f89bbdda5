"""Codecs of a library, built from their config and filled from their files: strictly, and only the parts in use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.checkpoint.header import TensorEntry
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.checkpoint.stream import emptied_on_error, fill, staging_buffer

CONFIG = "config.json"


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: It is not there, cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, got {type(content).__name__}")
    return content


def require_settings(file: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Hold settings of a file against the only values that are supported.

    Raises:
        CheckpointError: One is missing or another; the message names the file, the settings and both values.
    """
    missing = object()
    wrong = [
        f"{key} must be {value!r}, " + ("it is missing" if found is missing else f"got {found!r}")
        for key, value in wanted.items()
        if (found := settings.get(key, missing)) != value
    ]
    if wrong:
        raise CheckpointError(f"{file}: not of {what}: {listed(wrong)}")


def require_tensors(model: nn.Module, entries: Mapping[str, TensorEntry], source: Path) -> None:
    """Hold a checkpoint's headers against a model: the same keys, shapes, and floating point.

    Args:
        model: Its state dict's keys are the checkpoint's.
        entries: Of the checkpoint's files.
        source: What the message names.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or not of floating point.
    """
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in entries]
    problems += [f"{key} is none of the model's" for key in entries if key not in wanted]
    for key in wanted.keys() & entries.keys():
        entry, shape = entries[key], tuple(wanted[key].shape)
        if entry.shape != shape:
            problems.append(f"{key} must be {list(shape)}, got {list(entry.shape)}")
        elif entry.dtype not in ("BF16", "F16", "F32", "F64"):
            problems.append(f"{key} must be of floating point, got {entry.dtype}")
    if problems:
        raise CheckpointError(f"{source}: {listed(sorted(problems))}")


def fill_parts(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    parts: Iterable[str],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Fill some parts of a model on "meta" from a checkpoint, and drop the others.

    Args:
        model: As :func:`require_tensors` was given it.
        entries: Likewise.
        parts: Names of the model's children that are used; the others are removed, none of their data are read.
        device: Where the tensors go, in pieces.
        dtype: Of them.

    Raises:
        CheckpointError: A tensor has NaN or Inf, or cannot be read.
        ValueError: This machine does not have the device.
    """
    place, used = usable_device(device), set(parts)
    for name in [name for name, _ in model.named_children() if name not in used]:
        delattr(model, name)
    chosen = [entry for key, entry in entries.items() if key.partition(".")[0] in used]
    like = {entry.key: torch.empty(0, dtype=dtype) for entry in chosen}
    with emptied_on_error(model):
        fill(model, chosen, like, place, staging_buffer(place), lambda count: None)
    model.requires_grad_(False).eval()
