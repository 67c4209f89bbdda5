"""Checkpoints in the published format, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from happyhorse_fast.arguments import whole_number
from happyhorse_fast.checkpoint.header import INDEX_FILE, PACKED_FILE, SINGLE_FILE, WHOLE_NAMES
from happyhorse_fast.fast.compiled import published_key, unwrapped
from happyhorse_fast.fast.state import is_accelerated
from happyhorse_fast.files import is_special, real_path

_SHARD = re.compile(r"(?:diffusion_pytorch_)?model-\d+-of-\d+\.safetensors")


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in the published format: ``model.safetensors``, or shards and their index.

    Everything is written aside, on the same disk, and moved into place once it is complete: an interruption leaves the
    folder as it was. A link to a folder is followed; a link in it, as to a shared cache, is replaced, its target kept.

    Args:
        model_or_state_dict: A model that is not accelerated, or tensors by state-dict key; dtypes are kept. Names that
            ``torch.compile`` puts into keys (``_orig_mod``) are left out.
        folder: Where to write; made where it does not exist. Other files in it stay.
        max_shard_bytes: Shards hold at most this many bytes of data, or a single tensor. One file where all fits.
        overwrite: Replace a checkpoint that is there.

    Raises:
        FileExistsError: ``folder`` holds a checkpoint and ``overwrite`` is not set, or it is a file.
        OSError: It cannot be written.
        TypeError: Not a model and not a mapping from keys to tensors.
        ValueError: The model is accelerated; no tensors, a tensor on ``"meta"``, or ``max_shard_bytes`` below 1.
    """
    if isinstance(model_or_state_dict, nn.Module) and is_accelerated(unwrapped(model_or_state_dict)):
        raise ValueError(
            "model is accelerated, its weights are packed: use save_packed, or restore(model) first for a checkpoint "
            "in the published format"
        )
    write_checkpoint(model_or_state_dict, folder, {}, max_shard_bytes=max_shard_bytes, overwrite=overwrite)


def write_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, torch.Tensor],
    folder: str | Path,
    beside: Mapping[str, str],
    *,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """As :func:`save_checkpoint`, of any model, with text files (name -> content) that belong to it."""
    tensors = _tensors_of(model_or_state_dict)
    most = whole_number(max_shard_bytes)
    if most is None or most < 1:
        raise ValueError(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder must be a folder, {folder} is a file")
    names = {*WHOLE_NAMES, PACKED_FILE, *beside}
    old = sorted(path for path in folder.glob("*") if path.name in names or _SHARD.match(path.name))
    if old and not overwrite:
        raise FileExistsError(f"{folder} holds a checkpoint ({old[0].name}); pass overwrite=True to replace it")
    irregular = [path.name for path in old if path.is_dir() or is_special(path)]
    if irregular:
        raise FileExistsError(f"{folder} must hold files that can be replaced; {irregular[0]} is no regular file")
    folder = real_path(folder)  # through a link, also one whose target is still to be made
    # Beside a folder that is still to be made, inside one that exists (which may be the root of a disk).
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    aside = home / f".{folder.name}.{uuid.uuid4().hex}.partial"
    aside.mkdir()
    try:
        _write_files(tensors, aside, most, folder)
        for name, content in beside.items():
            (aside / name).write_text(content)
        if folder.exists():
            _move_into(folder, aside, old)
        else:
            aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tensors_of(model_or_state_dict: object) -> dict[str, torch.Tensor]:
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    if not isinstance(state, Mapping):
        raise TypeError(f"model_or_state_dict must be a model or a mapping, got {type(model_or_state_dict).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"model_or_state_dict must map keys to tensors, got {key!r}: {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"model_or_state_dict must hold data, got {key} on the meta device")
    if not state:
        raise ValueError("model_or_state_dict must hold tensors, got none")
    return {published_key(key): value for key, value in state.items()}


def _write_files(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_bytes: int, named: Path) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, value in tensors.items():
        if shards[-1] and filled + value.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += value.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for name, keys in zip(names, shards, strict=True):
        shard = {key: tensors[key].detach().cpu().contiguous() for key in keys}
        storages = Counter(value.untyped_storage().data_ptr() for value in shard.values())
        for key, value in shard.items():
            if storages[value.untyped_storage().data_ptr()] > 1:  # tied: the format has no two names for one tensor
                shard[key] = value.clone()
        write_safetensors(shard, folder / name, {"format": "pt"}, named=named / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str], *, named: Path | None = None
) -> None:
    """Write one safetensors file, readable by whom the umask says: the library's own (0.8) are for their owner alone.

    Raises:
        OSError: It cannot be written; the message names ``named``, whose place ``file`` is to take, where it is given.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{named or file} cannot be written: {error}") from error
    file.chmod(mode)


def _move_into(folder: Path, aside: Path, old: list[Path]) -> None:
    """Swap the old files for the new ones; an index leaves first and comes last. Undone where it is interrupted."""
    new = sorted(aside.iterdir())
    retired = aside / "replaced"
    retired.mkdir()
    moves = [(path, retired / path.name) for path in reversed(old)] + [(path, folder / path.name) for path in new]
    try:
        for source, target in moves:
            source.replace(target)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists():
                target.replace(source)
        raise
