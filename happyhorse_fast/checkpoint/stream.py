"""Tensors read from safetensors files in pieces, straight into the memory and dtype they stay in."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from itertools import groupby

import torch
from torch import nn

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import DTYPES, TensorEntry
from happyhorse_fast.eager.sizes import layer_of

# Bytes read at a time, a multiple of every item size. All a load takes beside the weights.
STAGING_BYTES = 16 << 20


@contextmanager
def emptied_on_error(model: nn.Module) -> Iterator[None]:
    """Free a model's tensors where loading into it fails; an error outlives the call, and its frames hold tensors."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        model.to("meta")
        raise


class TensorReader:
    """Reads tensors of safetensors files in pieces, all through one buffer of :data:`STAGING_BYTES` on the host.

    Args:
        device: Where the tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")

    def fill(self, model: nn.Module, entries: Iterable[TensorEntry], like: Mapping[str, torch.Tensor]) -> None:
        """Read tensors into a model, each into the dtype of ``like`` for its key; those of a file follow each other."""
        for file, together in groupby(entries, key=lambda entry: entry.file):
            with file.open("rb", buffering=0) as stream:
                for entry in together:
                    assign(model, entry.key, self.read(stream, entry, like[entry.key].dtype))

    def read(self, stream: FileIO, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        """Read one tensor into its final memory and dtype; NaN or Inf in it is an error."""
        value = torch.empty(entry.shape, dtype=dtype, device=self.device)
        flat, stored = value.view(-1), DTYPES[entry.dtype]
        buffer = self.staging.numpy().data
        stream.seek(entry.start)
        for start in range(0, entry.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), entry.nbytes - start)]
            _read_exactly(stream, piece, entry)
            first = start // stored.itemsize
            # Synchronous, so that the next piece may overwrite the staging buffer.
            flat[first : first + len(piece) // stored.itemsize].copy_(self.staging[: len(piece)].view(stored))
        if not is_finite(value):
            bad = int((~torch.isfinite(value.float())).sum())
            raise CheckpointError(
                f"{entry.file}: {entry.key} holds {bad} NaN or Inf among {value.numel()} elements "
                f"(stored as {entry.dtype}, read as {dtype})"
            )
        return value


def fill_by_layer(
    model: nn.Module,
    entries: Iterable[TensorEntry],
    device: torch.device,
    done: Callable[[int | None], None],
    *,
    progress: bool,
) -> None:
    """Fill a model on ``"meta"``: what is of no layer, by which some errors show at once, then layer by layer.

    Args:
        model: It has all the tensors' keys.
        entries: The tensors.
        device: Where they go.
        done: Called with None after what is of no layer, then with the number of each layer that is complete.
        progress: Show a progress bar on standard error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    groups: dict[int | None, list[TensorEntry]] = {}
    for entry in entries:
        groups.setdefault(layer_of(entry.key), []).append(entry)
    total = sum(entry.nbytes for group in groups.values() for entry in group)
    like, reader = model.state_dict(), TensorReader(device)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("loading", *columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("loading", total=total)

        def counted(group: list[TensorEntry]) -> Iterator[TensorEntry]:
            for entry in group:
                yield entry
                bar.advance(task, entry.nbytes)

        for layer in sorted(groups, key=lambda layer: -1 if layer is None else layer):
            reader.fill(model, counted(groups[layer]), like)
            done(layer)


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf; codes of e4m3, which ``torch.isfinite`` does not take, included."""
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
