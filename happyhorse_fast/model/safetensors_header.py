"""What a checkpoint's files declare: which tensor lies where, of what dtype and shape, without reading any of its data.

A safetensors file is 8 bytes of header length (little endian), a JSON header, and the data. The headers are read here
rather than by the safetensors library, whose errors name neither file nor key.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from happyhorse_fast.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PACKED_FILE = "happyhorse_fast.json"
"""Marks a folder of packed weights, and holds their configurations."""

# The safetensors library's own limit; the full model's header takes 60 kB.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LISTED = 5


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, as its file's header declares it.

    Attributes:
        key: State-dict key.
        file: The file that holds it.
        dtype: The format's name for its dtype, such as ``"BF16"``.
        shape: Its shape.
        start: Byte in the file where its data start.
        nbytes: Bytes of its data.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def listed(items: Iterable[str]) -> str:
    """The first five items and how many more there are, for a message."""
    every = list(items)
    more = f"; and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return "; ".join(every[:_LISTED]) + more


def read_headers(path: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint by key, in the order of its files and of the data in them; no data are read.

    Args:
        path: A folder with ``model.safetensors``, or with shards named by ``model.safetensors.index.json``; or one
            ``.safetensors`` file.

    Raises:
        CheckpointError: No such folder or file, a pickle, a missing or truncated shard, a corrupt index or header, an
            index that disagrees with its shards, or a key in two shards; the message names the files and keys.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file")
    if path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(_pickle_message(str(path)))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint is a folder or a .safetensors file")
    return _read_file(path)


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove one, or name the file to load"
        )
    if single.exists():
        return _read_file(single)
    if index.exists():
        return _read_shards(folder, index)
    names = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; it holds {listed(others)}: name one file to load it, "
            "or restore the index of these shards"
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(_pickle_message(f"{folder}: no safetensors file, but {listed(pickles)}"))
    raise CheckpointError(f"{folder}: no safetensors file: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    pickles = [name for name in shards if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(_pickle_message(f"{index}: names {listed(pickles)}"))
    outside = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise CheckpointError(
            f"{index}: a shard must be a .safetensors file beside it, got {listed(map(repr, outside))}"
        )
    absent = [name for name in shards if not (folder / name).exists()]
    if absent:
        examples = (f"{name} (with {next(k for k, shard in weight_map.items() if shard == name)})" for name in absent)
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(shards)} shards are missing from {folder}: {listed(examples)}"
        )
    headers = {name: _read_file(folder / name) for name in shards}
    count = Counter(key for header in headers.values() for key in header)
    twice = (
        f"{key} in {' and '.join(name for name, header in headers.items() if key in header)}"
        for key, times in count.items()
        if times > 1
    )
    entries = {key: entry for header in headers.values() for key, entry in header.items()}
    astray = (
        f"{key} in {shard}" + (f" (it is in {entries[key].file.name})" if key in entries else " (no shard has it)")
        for key, shard in weight_map.items()
        if key not in headers[shard]
    )
    unnamed = (f"{key} in {entry.file.name}" for key, entry in entries.items() if key not in weight_map)
    kinds = {
        "keys in several shards": list(twice),
        "keys that are not in the shard the index names": list(astray),
        "keys of the shards that are not in the index": list(unnamed),
    }
    problems = [f"{kind} ({len(found)}): {listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise CheckpointError(f"{index}: " + "\n  ".join(problems))
    return entries


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = _parse_json(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: corrupt index: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: corrupt index: no "weight_map" from key to file')
    strange = [f"{key}: {name!r}" for key, name in weight_map.items() if not isinstance(name, str)]
    if strange:
        raise CheckpointError(f'{index}: corrupt index: in "weight_map" a file must be a string, got {listed(strange)}')
    return weight_map


def _read_file(file: Path) -> dict[str, TensorEntry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            raw = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: truncated: {size} bytes, a safetensors file has at least 8")
    if length > _MAX_HEADER_BYTES:
        # Only now: a header of 640 bytes starts as a pickle does.
        if prefix.startswith(_PICKLE_STARTS):
            raise CheckpointError(_pickle_message(f"{file}: named .safetensors, but"))
        if prefix == b"version ":
            raise CheckpointError(f"{file}: a Git LFS pointer of {size} bytes, not the file; run `git lfs pull`")
        raise CheckpointError(f"{file}: not a safetensors file: declares a header of {length} bytes")
    if len(raw) < length:
        raise CheckpointError(f"{file}: truncated: declares a header of {length} bytes, {len(raw)} are there")
    try:
        header = _parse_json(raw)
        entries = [_entry(file, key, fields, 8 + length) for key, fields in header.items() if key != "__metadata__"]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt header: {error}") from error
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise CheckpointError(
                f"{file}: corrupt header: {entry.key} starts at byte {entry.start}, the one before it ends at {end}"
            )
        end += entry.nbytes
    cut = [entry.key for entry in entries if entry.start + entry.nbytes > size]
    if cut:
        raise CheckpointError(
            f"{file}: truncated: {size} of {end} bytes; {len(cut)} of {len(entries)} tensors are cut off: {listed(cut)}"
        )
    if end != size:
        raise CheckpointError(f"{file}: corrupt: {size - end} bytes after the end of the last tensor")
    return {entry.key: entry for entry in entries}


def _entry(file: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            pass
        case _:
            raise ValueError(f"{key} must have dtype, shape and data_offsets, got {fields!r}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{key} has the shape {shape!r}")
    declared = math.prod(shape) * _ITEM_BYTES[dtype] if dtype in _ITEM_BYTES else end - start
    if declared != end - start:
        raise ValueError(f"{key} takes {declared} bytes as {dtype} {shape}, data_offsets give it {end - start}")
    return TensorEntry(key, file, dtype, tuple(shape), data_start + start, end - start)


def _parse_json(raw: bytes) -> dict[str, Any]:
    content = json.loads(raw, object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if repeated:
        raise ValueError(f"the same key twice: {listed(repeated)}")
    return dict(pairs)


def _pickle_message(subject: str) -> str:
    return (
        f"{subject}: a pickle, which is refused because reading one can run code it carries; "
        "convert it to safetensors where it is trusted (torch.load with weights_only=True, then save_checkpoint)"
    )
