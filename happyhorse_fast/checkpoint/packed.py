"""Checkpoints of packed weights: what an accelerated model holds, so that it loads without packing again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from happyhorse_fast._version import __version__
from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.checkpoint.header import DTYPES, PACKED_FILE, TensorEntry, read_headers, require_regular_file
from happyhorse_fast.checkpoint.save import write_checkpoint
from happyhorse_fast.config import OPS, ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import choose_ops, empty_accelerated
from happyhorse_fast.fast.compiled import unwrapped
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, TopP
from happyhorse_fast.fast.state import FastState, is_accelerated
from happyhorse_fast.ops.runtime.checks import compute_capability

FORMAT = 1
"""Version of the packed layout; another one must be packed again from the published checkpoint."""
_POLICIES = {policy.__name__: policy for policy in (TopK, TopP, Tiles)}


def is_packed(path: str | Path) -> bool:
    """Whether a folder holds packed weights."""
    description = Path(path) / PACKED_FILE
    return description.exists() or description.is_symlink()


def save_packed(
    model: nn.Module, folder: str | Path, *, max_shard_bytes: int = 5 << 30, overwrite: bool = False
) -> None:
    """Write an accelerated model's packed weights and configurations, atomically; :func:`load` takes the folder.

    Args:
        model: An accelerated :class:`HappyHorse`.
        folder: Where to write. It holds the model's FastConfig too, backend ``"reference"`` as ``"auto"``.
        max_shard_bytes: As for :func:`save_checkpoint`.
        overwrite: Replace a checkpoint that is there.

    Raises:
        ValueError: The model is not an accelerated HappyHorse.
        FileExistsError: As for :func:`save_checkpoint`.
    """
    model = unwrapped(model)
    if not is_accelerated(model):
        raise ValueError("model must be an accelerated HappyHorse; call accelerate(model) first")
    if not isinstance(model, HappyHorse):
        raise ValueError(
            f"model must be an accelerated HappyHorse, got {type(model).__name__} of the public implementation, whose "
            "windows and coordinates are not part of it: save_packed what load(folder, preset, fast=...) makes of the "
            "same checkpoint"
        )
    state: FastState = model.fast  # type: ignore[assignment]
    fast = dataclasses.asdict(state.fast)
    if state.fast.backend == "reference":
        fast["backend"] = "auto"  # packed on a machine without a GPU, run on one with
    if state.fast.sparsity is not None:
        fast["sparsity"] = {"policy": type(state.fast.sparsity).__name__, **dataclasses.asdict(state.fast.sparsity)}
    description = {"format": FORMAT, "version": __version__, "config": state.config.to_dict(), "fast": fast}
    beside = {PACKED_FILE: json.dumps(description, indent=2) + "\n"}
    write_checkpoint(model, folder, beside, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def packed_config(folder: str | Path, fast: FastConfig | None) -> tuple[ModelConfig, FastConfig]:
    """A packed folder's configurations, the second replaced by ``fast`` where that is given.

    Raises:
        CheckpointError: The description is missing or not one.
        ValueError: It asks for another precision of a product than the weights were packed in.
    """
    config, saved = _description(Path(folder) / PACKED_FILE)
    if fast is None:
        return config, saved
    for layer in range(config.num_layers):
        for op in (op for op in OPS if op != "attention"):  # whose format touches no packed tensor
            asked, there = fast.precision_of(op, layer), saved.precision_of(op, layer)
            if asked != there:
                raise ValueError(
                    f"fast must have the precision of the packed weights in {str(folder)!r}: {op} of layer {layer} is "
                    f"{there} there, fast asks for {asked}; pack the published checkpoint again, or leave fast out"
                )
    return config, fast


def empty_packed(
    folder: Path, device: torch.device, fast: FastConfig | None
) -> tuple[HappyHorse, dict[str, TensorEntry]]:
    """The model of packed weights, on ``"meta"``, and the tensors to fill it with; see :func:`load`, which does.

    Raises:
        CheckpointError: The description or a tensor is missing, unexpected, misshapen or of another dtype.
        ValueError: As :func:`packed_config`.
        BackendError: As for :func:`accelerate`.
    """
    config, fast = packed_config(folder, fast)
    entries = read_headers(folder)
    arch = compute_capability(device)
    model = empty_accelerated(config, fast, choose_ops(fast.on(arch), device, None), arch)
    _require_entries(entries, model.state_dict(), folder)
    return model, entries


def _description(file: Path) -> tuple[ModelConfig, FastConfig]:
    require_regular_file(file)
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(
                f"packed format {content['format']}, this version reads {FORMAT}; pack the published checkpoint again"
            )
        fast = dict(content["fast"])
        if fast["sparsity"] is not None:
            sparsity = dict(fast["sparsity"])
            fast["sparsity"] = _POLICIES[sparsity.pop("policy")](**sparsity)
        return ModelConfig(**content["config"]), FastConfig(**fast)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file}: not a description of packed weights: {type(error).__name__}: {error}"
        ) from error


def _require_entries(entries: Mapping[str, TensorEntry], wanted: Mapping[str, torch.Tensor], folder: Path) -> None:
    kinds = {
        "missing": [key for key in wanted if key not in entries],
        "unexpected": [key for key in entries if key not in wanted],
        "differing": [
            f"{key} in {entry.file} is {entry.dtype} {list(entry.shape)}, must be {like.dtype} {list(like.shape)}"
            for key, like in wanted.items()
            if (entry := entries.get(key))
            and (entry.shape != tuple(like.shape) or DTYPES.get(entry.dtype) != like.dtype)
        ],
    }
    problems = [f"{kind} {len(found)} tensors: {listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise CheckpointError(
            f"{folder}: not the packed weights its {PACKED_FILE} describes:\n  " + "\n  ".join(problems)
        )
