"""Checkpoints of packed weights: what an accelerated model holds, so that it loads without packing again."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from happyhorse_fast._version import __version__
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.errors import CheckpointError
from happyhorse_fast.model.accelerate import choose_ops, empty_accelerated
from happyhorse_fast.model.fast_config import FastConfig, Tiles, TopK, TopP
from happyhorse_fast.model.fast_state import FastState, is_accelerated
from happyhorse_fast.model.inspect_checkpoint import BANDS_KEY, STORED_DTYPES
from happyhorse_fast.model.safetensors_header import PACKED_FILE, TensorEntry, listed, read_headers
from happyhorse_fast.reference.model import HappyHorse
from happyhorse_fast.reference.rotary import frequency_bands

FORMAT = 1
"""Version of the packed layout; another one must be packed again from the published checkpoint."""
_POLICIES = {policy.__name__: policy for policy in (TopK, TopP, Tiles)}


def is_packed(path: str | Path) -> bool:
    """Whether a folder holds packed weights."""
    return (Path(path) / PACKED_FILE).is_file()


def save_packed(
    model: nn.Module, folder: str | Path, *, max_shard_bytes: int = 5 << 30, overwrite: bool = False
) -> None:
    """Write an accelerated model's packed weights and configurations, atomically; :func:`load` takes the folder.

    Args:
        model: An accelerated :class:`HappyHorse`.
        folder: Where to write.
        max_shard_bytes: As for :func:`save_checkpoint`.
        overwrite: Replace a checkpoint that is there.

    Raises:
        ValueError: The model is not an accelerated HappyHorse.
        FileExistsError: As for :func:`save_checkpoint`.
    """
    from happyhorse_fast.model.checkpoint import save_checkpoint

    if not isinstance(model, HappyHorse) or not is_accelerated(model):
        raise ValueError("model must be an accelerated HappyHorse; call accelerate(model) first")
    state: FastState = model.fast  # type: ignore[assignment]
    fast = dataclasses.asdict(state.fast)
    if state.fast.sparsity is not None:
        fast["sparsity"] = {"policy": type(state.fast.sparsity).__name__, **dataclasses.asdict(state.fast.sparsity)}
    description = {"format": FORMAT, "version": __version__, "config": state.config.to_dict(), "fast": fast}
    save_checkpoint(
        model,
        folder,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        beside={PACKED_FILE: json.dumps(description, indent=2) + "\n"},
    )


def load_packed(folder: str | Path, device: torch.device, *, progress: bool) -> HappyHorse:
    """Load packed weights; see :func:`load`, which calls this.

    Raises:
        CheckpointError: The description or a tensor is missing, unexpected, misshapen or of another dtype.
        BackendError: As for :func:`accelerate`.
    """
    from happyhorse_fast.model.checkpoint import assign, progress_bar, read_tensor, staging_buffer

    folder = Path(folder)
    config, fast = _description(folder / PACKED_FILE)
    entries = read_headers(folder)
    model = empty_accelerated(config, fast, choose_ops(fast, device, None))
    _require_entries(entries, model.state_dict(), folder)
    staging = staging_buffer(device)
    try:
        with progress_bar(progress, sum(entry.nbytes for entry in entries.values())) as advance:
            for entry in entries.values():
                with entry.file.open("rb", buffering=0) as stream:
                    dtype = STORED_DTYPES[entry.dtype]
                    assign(model, entry.key, read_tensor(stream, entry, dtype, device, staging, advance))
    except BaseException as error:
        # The error outlives this call, and the frames it refers to hold tensors.
        traceback.clear_frames(error.__traceback__)
        model.to("meta")
        raise
    assign(model, BANDS_KEY, frequency_bands(config.head_dim, device))
    return model


def _description(file: Path) -> tuple[ModelConfig, FastConfig]:
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{file}: packed format {content['format']}, this version reads {FORMAT}; pack the published "
                "checkpoint again"
            )
        fast = dict(content["fast"])
        if fast["sparsity"] is not None:
            sparsity = dict(fast["sparsity"])
            fast["sparsity"] = _POLICIES[sparsity.pop("policy")](**sparsity)
        return ModelConfig(**content["config"]), FastConfig(**fast)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: not a description of packed weights: {type(error).__name__}: {error}"
        ) from error


def _require_entries(entries: Mapping[str, TensorEntry], wanted: Mapping[str, torch.Tensor], folder: Path) -> None:
    problems = []
    missing = [k for k in wanted if k not in entries]
    unexpected = [k for k in entries if k not in wanted]
    if missing:
        problems.append(f"missing {len(missing)} tensors: {listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected tensors: {listed(unexpected)}")
    for key, entry in entries.items():
        like = wanted.get(key)
        if like is None:
            continue
        found = STORED_DTYPES.get(entry.dtype)
        if entry.shape != tuple(like.shape) or found != like.dtype:
            problems.append(
                f"{entry.file}: {key} is {entry.dtype} {list(entry.shape)}, wanted {like.dtype} {list(like.shape)}"
            )
    if problems:
        raise CheckpointError(
            f"{folder}: not the packed weights its {PACKED_FILE} describes:\n  " + "\n  ".join(problems)
        )
