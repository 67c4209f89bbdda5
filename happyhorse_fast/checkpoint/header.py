"""Headers of a checkpoint's files: where each tensor lies, its dtype and shape, its key in the model. No data are read.

A safetensors file is 8 bytes of header length (little endian), a JSON header, and the data. The headers are parsed here
rather than by the safetensors library: it gives no offsets, its errors name neither file nor key nor how many bytes are
missing ("incomplete metadata, file not fully covered"), and of a key that is there twice it takes the last (0.8.0).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.eager.sizes import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
"""As diffusers names a single file; shards have an index of that name too."""
WHOLE_NAMES = (SINGLE_FILE, INDEX_FILE, DIFFUSERS_FILE, DIFFUSERS_FILE + ".index.json")
"""Of the file that makes a folder a checkpoint."""
PACKED_FILE = "happyhorse_fast.json"
"""Marks a folder of packed weights, and holds their configurations."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
"""Dtypes of published and packed checkpoints."""

# The safetensors library's own limit; the full model's header takes 60 kB.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_INDEX_SUFFIX = ".safetensors.index.json"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_IN_MODEL = re.compile(
    r"^(?P<prefix>(?:.*?\.)??)(?:adapter\.(?:rope|\w+_embedder)|block\.layers|final_(?:norm|linear)_\w+)\."
)


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """One tensor of a checkpoint, as its file's header declares it.

    Attributes:
        start: Byte in the file where its data start.
        nbytes: Bytes of its data.
    """

    start: int
    nbytes: int


def read_headers(path: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint by key, in the order of its files and of the data in them; no data are read.

    Args:
        path: A folder with ``model.safetensors``, or with shards named by ``model.safetensors.index.json`` (or either
            under diffusers' name, ``diffusion_pytorch_model``); or one ``.safetensors`` file or index. Keys may have
            a prefix that all share, such as ``module.`` or ``transformer.``; entries have none.

    Raises:
        CheckpointError: No such folder or file, a link to nowhere, a FIFO or device, a pickle, a missing or truncated
            shard, a corrupt index or header, an index that disagrees with its shards, a key in two shards, or keys of
            more than one model; the message names the files and keys.
    """
    path = Path(path)
    if path.is_dir():
        entries = _read_folder(path)
    elif not path.exists():
        raise CheckpointError(f"{path}: {_absent(path)}")
    else:
        require_regular_file(path)
        if path.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_message(str(path)))
        if path.suffix != ".safetensors" and not path.name.endswith(_INDEX_SUFFIX):
            raise CheckpointError(f"{path}: a checkpoint is a folder or a .safetensors file, or its {_INDEX_SUFFIX}")
        entries = _read_whole(path)
    keys = _model_keys(entries, path)
    return {keys[key]: dataclasses.replace(entry, key=keys[key]) for key, entry in entries.items()}


def _model_keys(keys: Iterable[str], path: Path) -> dict[str, str]:
    """The model's key of every key of a checkpoint that was saved from within a wrapper.

    What torch.compile, FSDP and activation checkpointing put into keys is taken out anywhere; a prefix (``module.``,
    ``model.``, ``transformer.``, ...) where all keys share it.
    """
    bare = {key: _WRAPPERS.sub("", key) for key in keys}
    matches = {key: _IN_MODEL.match(name) for key, name in bare.items()}
    prefixes = Counter(match["prefix"] for match in matches.values() if match)
    others = [key for key, match in matches.items() if match is None]
    if prefixes and "" not in prefixes:
        if len(prefixes) > 1 or others:
            found = [f"{prefix!r} ({count})" for prefix, count in prefixes.most_common()]
            beside = f" and {len(others)} without, such as {others[0]}" if others else ""
            raise CheckpointError(
                f"{path}: holds more than a model: keys with the prefix {', '.join(found)}{beside}. Save the "
                "tensors of one model alone (load_file, choose, save_checkpoint)"
            )
        prefix = next(iter(prefixes))
        bare = {key: name.removeprefix(prefix) for key, name in bare.items()}
    twice = [name for name, count in Counter(bare.values()).items() if count > 1]
    if twice:
        both = [key for key, name in bare.items() if name == twice[0]]
        raise CheckpointError(f"{path}: {' and '.join(both)} are the same tensor of a model")
    return bare


def _read_whole(file: Path) -> dict[str, TensorEntry]:
    return _read_shards(file) if file.name.endswith(_INDEX_SUFFIX) else read_file(file)


def _absent(path: Path) -> str:
    return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "no such folder or file"


def require_regular_file(file: Path) -> None:
    """Raise a CheckpointError for a link to nowhere, and for a FIFO or device, which has no size and may block."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{file}: {_absent(file)}" if not file.exists() else f"{file}: {error}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(mode), "a folder")
        raise CheckpointError(f"{file}: must be a regular file, as its parts are read by their place; it is {what}")


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    there = [name for name in WHOLE_NAMES if (folder / name).exists() or (folder / name).is_symlink()]
    if len(there) > 1:
        raise CheckpointError(f"{folder}: holds both {' and '.join(there)}; remove one, or name the file to load")
    if there:
        return _read_whole(folder / there[0])
    names = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    others += [name for name in names if name.endswith(".safetensors")]
    missing = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    if others:
        raise CheckpointError(
            f"{folder}: {missing}; it holds {listed(others)}: name one file to load it, or restore the index of these "
            "shards"
        )
    inside = [name for name in names if any((folder / name / whole).exists() for whole in WHOLE_NAMES)]
    if inside:
        raise CheckpointError(f"{folder}: {missing}; its folder {listed(inside)} has one: name that")
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(_pickle_message(f"{folder}: no safetensors file, but {listed(pickles)}"))
    raise CheckpointError(f"{folder}: no safetensors file: {missing}")


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    weight_map, folder = read_index(index), index.parent
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
        first = {name: next(key for key, shard in weight_map.items() if shard == name) for name in absent}
        examples = (f"{name} (with {first[name]}, {_absent(folder / name)})" for name in absent)
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(shards)} shards are missing from {folder}: {listed(examples)}"
        )
    entries: dict[str, TensorEntry] = {}
    places: dict[str, list[str]] = {}
    for name in shards:
        header = read_file(folder / name)
        entries |= header
        for key in header:
            places.setdefault(key, []).append(name)
    kinds = {
        "keys in several shards": [
            f"{key} in {' and '.join(found)}" for key, found in places.items() if len(found) > 1
        ],
        "keys that are not in the shard the index names": [
            f"{key} in {shard} (" + (f"it is in {places[key][0]})" if key in places else "no shard has it)")
            for key, shard in weight_map.items()
            if shard not in places.get(key, ())
        ],
        "keys of the shards that are not in the index": [
            f"{key} in {found[0]}" for key, found in places.items() if key not in weight_map
        ],
    }
    problems = [f"{kind} ({len(found)}): {listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise CheckpointError(f"{index}: " + "\n  ".join(problems))
    return entries


def read_index(index: Path) -> dict[str, str]:
    """The index of a checkpoint in shards: key -> name of its file.

    Raises:
        CheckpointError: It cannot be read, or is none.
    """
    require_regular_file(index)
    try:
        content = parse_json(index.read_bytes())
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


def read_file(file: Path) -> dict[str, TensorEntry]:
    """As :func:`read_headers`, of one safetensors file of whatever it holds, keys as they are."""
    require_regular_file(file)
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
        header = parse_json(raw)
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
    by_key = {entry.key: entry for entry in entries}
    return by_key | _tied(by_key, header.get("__metadata__"))


def _tied(entries: dict[str, TensorEntry], metadata: object) -> dict[str, TensorEntry]:
    """Tensors that safetensors' save_model left out because they share memory with another, which metadata names."""
    named = metadata.items() if isinstance(metadata, dict) else ()
    return {
        key: dataclasses.replace(entries[kept], key=key)
        for key, kept in named
        if isinstance(kept, str) and kept in entries and key not in entries
    }


def _entry(file: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            pass
        case _:
            raise ValueError(f"{key} must have dtype, shape and data_offsets, got {fields!r}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{key} has the shape {shape!r}")
    declared = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - start
    if declared != end - start:
        raise ValueError(f"{key} takes {declared} bytes as {dtype} {shape}, data_offsets give it {end - start}")
    return TensorEntry(key, file, dtype, tuple(shape), data_start + start, end - start)


def parse_json(raw: bytes | str) -> dict[str, Any]:
    """A JSON object without a key that is there twice; a ValueError says what else it is."""
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
