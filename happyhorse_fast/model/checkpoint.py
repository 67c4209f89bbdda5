"""Checkpoints in the published format: streamed from disk into a model, and written from one."""

from __future__ import annotations

import json
import re
import shutil
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.errors import CheckpointError
from happyhorse_fast.model.accelerate import Accelerating
from happyhorse_fast.model.fast_config import FastConfig
from happyhorse_fast.model.inspect_checkpoint import BANDS_KEY, STORED_DTYPES, layer_of, read_sizes, require_sizes
from happyhorse_fast.model.safetensors_header import INDEX_FILE, PACKED_FILE, SINGLE_FILE, TensorEntry, read_headers
from happyhorse_fast.reference.model import HappyHorse
from happyhorse_fast.reference.rotary import frequency_bands

__all__ = ["load", "read_sizes", "save_checkpoint"]

# Bytes read at a time, a multiple of every item size. All a load takes beside the weights.
STAGING_BYTES = 16 << 20
# Largest relative difference of stored and computed rotary frequencies; they agree to 2e-7 (float32 powers) at most.
BANDS_TOLERANCE = 1e-6

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

Advance = Callable[[int], None]


def load(
    path: str | Path,
    preset: str | None = None,
    config: ModelConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    fast: FastConfig | None = None,
) -> HappyHorse:
    """Load a checkpoint: in the published format, or packed by :func:`save_packed`.

    Headers are checked before any data are read. Then every tensor is streamed to the device in pieces of 16 MiB,
    straight into the memory and the dtype it stays in: linear weights inside layers in bfloat16, the rest in float32.

    Args:
        path: A folder with ``model.safetensors``, or with shards named by ``model.safetensors.index.json``; or one
            ``.safetensors`` file. A folder of packed weights carries its own configurations: then ``preset``,
            ``config`` and ``fast`` must be left out.
        preset: Name of the published configuration that the checkpoint is of; see :meth:`ModelConfig.preset`.
        config: The configuration instead. Exactly one of the two: ``local_attn_layers``, ``frame_receptive_field`` and
            ``coords_style`` cannot be read off the tensors; the sizes that can be are held against it.
        device: Where the weights go.
        compute_dtype: Dtype of products and attention, see :class:`HappyHorse`.
        progress: Show a progress bar on standard error.
        fast: Accelerate as :func:`accelerate` would, layer by layer while loading: one layer's published weights are on
            the device at a time, and they are not kept (so there is no :func:`restore`).

    Returns:
        The model, complete: on any error, Ctrl-C included, there is none, and its memory is free again.

    Raises:
        CheckpointError: As :func:`read_headers`; missing, unexpected or misshapen tensors, tensors that are not
            floating point, sizes other than the configuration's, NaN or Inf in a tensor, or rotary frequencies that are
            not the model's. The message names files and keys.
        TypeError: ``config`` is not a ModelConfig.
        ValueError: Not exactly one of ``preset`` and ``config``; no such preset, device or compute dtype.
    """
    from happyhorse_fast.model import packed_checkpoint

    place = _usable_device(device)
    if packed_checkpoint.is_packed(path):
        if preset is not None or config is not None or fast is not None:
            raise ValueError(f"preset, config and fast must be left out: {path} is packed and carries its own")
        return packed_checkpoint.load_packed(path, place, progress=progress)
    wanted, asked = _requested(preset, config)
    model = HappyHorse(wanted, compute_dtype, device="meta")
    entries = read_headers(path)
    require_sizes(entries, Path(path), wanted, asked)
    accelerating = Accelerating(model, wanted, fast, place) if fast is not None else None
    try:
        with progress_bar(progress, sum(entry.nbytes for entry in entries.values())) as advance:
            _stream(model, entries, place, advance, accelerating)
    except BaseException as error:
        # The error outlives this call, and the frames it refers to hold tensors.
        traceback.clear_frames(error.__traceback__)
        model.to("meta")
        raise
    return model


def _requested(preset: str | None, config: ModelConfig | None) -> tuple[ModelConfig, str]:
    if (preset is None) == (config is None):
        raise ValueError(
            f"exactly one of preset and config is required, got {'neither' if preset is None else 'both'}: "
            "local_attn_layers, frame_receptive_field and coords_style cannot be read off a checkpoint's tensors, and "
            f"a wrong guess would be silent. Presets: {', '.join(ModelConfig.preset_names())}"
        )
    if config is None:
        return ModelConfig.preset(str(preset)), f"preset {preset!r}"
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
    return config, "config"


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ValueError(f"device must be one that this machine has, got {str(device)!r}: {error}") from error
    if place.type == "meta":
        raise ValueError("device must be one that holds data, got 'meta'")
    return place


@contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Advance]:
    """A bar over bytes on standard error, where ``shown``; yields what to call with bytes that were read."""
    if not shown:
        yield lambda count: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("loading"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda count: bar.advance(task, count)


def staging_buffer(device: torch.device) -> torch.Tensor:
    """[STAGING_BYTES] uint8 on the host, pinned for a GPU."""
    return torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _stream(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    device: torch.device,
    advance: Advance,
    accelerating: Accelerating | None,
) -> None:
    """Fill a model on ``"meta"`` tensor by tensor: the rotary frequencies first, then in the files' order.

    Where the model is accelerated, layer by layer instead; a layer is packed once it is complete.
    """
    staging = staging_buffer(device)
    bands = frequency_bands(model.get_buffer(BANDS_KEY).shape[0] * 8)
    if BANDS_KEY in entries:
        entry = entries[BANDS_KEY]
        with entry.file.open("rb", buffering=0) as stream:
            stored = read_tensor(stream, entry, bands.dtype, torch.device("cpu"), staging, advance)
        error = float(((stored - bands) / bands).abs().max())
        if error > BANDS_TOLERANCE:
            raise CheckpointError(
                f"{entry.file}: {BANDS_KEY} differs from the model's rotary frequencies 10000^(-i/{len(bands)}) by a "
                f"relative {error:.1e}, more than {BANDS_TOLERANCE:.0e}: the checkpoint is of another model"
            )
        bands = stored
    assign(model, BANDS_KEY, bands.to(device))
    like = model.state_dict()
    rest = [entry for key, entry in entries.items() if key != BANDS_KEY]
    if accelerating is None:
        _fill(model, rest, like, device, staging, advance)
        return
    of_layer = itemgetter(0)
    keyed = sorted(
        ((layer_of(entry.key), entry) for entry in rest), key=lambda pair: -1 if pair[0] is None else pair[0]
    )
    for layer, together in groupby(keyed, key=of_layer):
        _fill(model, [entry for _, entry in together], like, device, staging, advance)
        if layer is not None:
            accelerating.pack(layer)
    accelerating.finish()


def _fill(
    model: nn.Module,
    entries: Iterable[TensorEntry],
    like: Mapping[str, torch.Tensor],
    device: torch.device,
    staging: torch.Tensor,
    advance: Advance,
) -> None:
    for file, together in groupby(entries, key=lambda entry: entry.file):
        with file.open("rb", buffering=0) as stream:
            for entry in together:
                value = read_tensor(stream, entry, like[entry.key].dtype, device, staging, advance)
                assign(model, entry.key, value)


def read_tensor(
    stream: FileIO,
    entry: TensorEntry,
    dtype: torch.dtype,
    device: torch.device,
    staging: torch.Tensor,
    advance: Advance,
) -> torch.Tensor:
    """Read one tensor through the staging buffer into its final memory and dtype; NaN or Inf in it is an error."""
    value = torch.empty(entry.shape, dtype=dtype, device=device)
    flat, stored = value.view(-1), STORED_DTYPES[entry.dtype]
    buffer = staging.numpy().data
    stream.seek(entry.start)
    for start in range(0, entry.nbytes, len(buffer)):
        piece = buffer[: min(len(buffer), entry.nbytes - start)]
        _read_exactly(stream, piece, entry)
        first = start // stored.itemsize
        # Synchronous, so that the next piece may overwrite the staging buffer.
        flat[first : first + len(piece) // stored.itemsize].copy_(staging[: len(piece)].view(stored))
        advance(len(piece))
    if not _is_finite(value):
        bad = int((~torch.isfinite(value.float())).sum())
        raise CheckpointError(
            f"{entry.file}: {entry.key} holds {bad} NaN or Inf among {value.numel()} elements "
            f"(stored as {entry.dtype}, read as {dtype})"
        )
    return value


def _is_finite(value: torch.Tensor) -> bool:
    if not value.dtype.is_floating_point:
        return True
    if value.dtype == torch.float8_e4m3fn:  # no Inf; NaN is 0x7f and 0xff
        return not bool((value.view(torch.uint8) & 0x7F == 0x7F).any())
    # NaN and Inf both show in the extremes: one pass without a temporary, 20 times as fast as isfinite on a CPU.
    return all(bool(torch.isfinite(extreme)) for extreme in value.aminmax())


def _read_exactly(stream: FileIO, piece: memoryview, entry: TensorEntry) -> None:
    filled = 0
    while filled < len(piece):
        try:
            count = stream.readinto(piece[filled:])
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot be read, within {entry.key}: {error}") from error
        if not count:
            raise CheckpointError(f"{entry.file}: truncated while it was read, within {entry.key}")
        filled += count


def assign(model: nn.Module, key: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, by state-dict key."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in the published format: ``model.safetensors``, or shards and their index.

    Everything is written aside, on the same disk, and moved into place once it is complete: an interruption leaves the
    folder as it was.

    Args:
        model_or_state_dict: A model, or tensors by state-dict key; dtypes are kept.
        folder: Where to write; made where it does not exist. Other files in it stay.
        max_shard_bytes: Shards hold at most this many bytes of data, or a single tensor. One file where all fits.
        overwrite: Replace a checkpoint that is there.
        beside: Text files that belong to it, name -> content.

    Raises:
        FileExistsError: ``folder`` holds a checkpoint and ``overwrite`` is not set, or it is a file.
        TypeError: Not a model and not a mapping from keys to tensors.
        ValueError: No tensors, a tensor on ``"meta"``, or ``max_shard_bytes`` below 1.
    """
    tensors = _tensors_of(model_or_state_dict)
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder must be a folder, {folder} is a file")
    names = {SINGLE_FILE, INDEX_FILE, PACKED_FILE, *(beside or ())}
    old = sorted(path for path in folder.glob("*") if path.name in names or _SHARD.match(path.name))
    if old and not overwrite:
        raise FileExistsError(f"{folder} holds a checkpoint ({old[0].name}); pass overwrite=True to replace it")
    # Beside a folder that is still to be made, inside one that exists (which may be the root of a disk).
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    aside = home / f".{folder.name}.{uuid.uuid4().hex}.partial"
    aside.mkdir()
    try:
        _write_files(tensors, aside, max_shard_bytes)
        for name, content in (beside or {}).items():
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
    return dict(state)


def _write_files(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> None:
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
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


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
