"""Models of a library, built from their config and filled from their files: strictly, and only the parts in use."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.checkpoint.header import TensorEntry
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.checkpoint.stream import emptied_on_error, fill, staging_buffer

CONFIG = "config.json"
FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes that a codec's tensors may have, as safetensors names them."""


class Codec(ABC):
    """A codec of diffusers with one or both of its halves; one that is not asked for takes no memory.

    Attributes:
        HALVES: Children of the library's model that make a half, ``"encoder"`` and ``"decoder"``.
        vae: The library's model.
    """

    HALVES: ClassVar[Mapping[str, tuple[str, ...]]]
    vae: Any

    @property
    def module(self) -> nn.Module:
        """What holds its weights."""
        return self.vae

    @staticmethod
    @abstractmethod
    def described(folder: Path) -> tuple[Any, dict[str, TensorEntry]]:
        """(The library's model on "meta", the entries of its files), which fit each other."""

    @classmethod
    def check(cls, folder: str | Path) -> None:
        """Make the checks of ``load`` that need no weights: config, keys, shapes, and that the files are whole.

        Raises:
            CheckpointError: As there.
            ImportError: As there.
        """
        cls.described(Path(folder))

    @classmethod
    def filled(
        cls, folder: str | Path, device: torch.device | str, dtype: torch.dtype, *, encoder: bool, decoder: bool
    ) -> Any:
        """The library's model with the halves that are asked for; arguments and errors as of ``load``."""
        if not (encoder or decoder):
            raise ValueError("encoder or decoder must be True, got False for both")
        vae, entries = cls.described(Path(folder))
        parts = [*(cls.HALVES["encoder"] if encoder else ()), *(cls.HALVES["decoder"] if decoder else ())]
        fill_parts(vae, entries, parts, device, dtype)
        return vae

    def require_half(self, half: str) -> None:
        """Hold that a half was loaded.

        Raises:
            ValueError: It was not.
        """
        if not hasattr(self.vae, half):
            raise ValueError(f"{half} must be True in {type(self).__name__}.load for this, it was False")


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


def require_tensors(
    wanted: Mapping[str, torch.Tensor],
    entries: Mapping[str, TensorEntry],
    source: str | Path,
    *,
    owner: str = "the model",
    dtypes: Collection[str] = FLOATS,
    kind: str = "of floating point",
) -> None:
    """Hold a checkpoint's headers against a model: the same keys, shapes, and floating point.

    Args:
        wanted: The model's state dict, by the checkpoint's keys.
        entries: Of the checkpoint's files.
        source: What the message begins with.
        owner: Whose tensors they are, in the message.
        dtypes: That a tensor may have, as safetensors names them.
        kind: Those, in the message.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or dtype.
    """
    problems = [f"{key} is missing" for key in wanted if key not in entries]
    problems += [f"{key} is none of {owner}'s" for key in entries if key not in wanted]
    for key in wanted.keys() & entries.keys():
        entry, shape = entries[key], tuple(wanted[key].shape)
        if entry.shape != shape:
            problems.append(f"{key} must be {list(shape)}, got {list(entry.shape)}")
        elif entry.dtype not in dtypes:
            problems.append(f"{key} must be {kind}, got {entry.dtype}")
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
        model: Whose state dict :func:`require_tensors` was given.
        entries: As it was given them.
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
