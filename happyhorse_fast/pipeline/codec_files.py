"""Codecs of a library, built from their config and filled from their files: strictly, and only the halves in use."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from happyhorse_fast import ambient
from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.checkpoint.header import DTYPES, TensorEntry
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.checkpoint.stream import TensorReader, emptied_on_error
from happyhorse_fast.optional import said

CONFIG = "config.json"
FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
"""Dtypes that tensors may have, as safetensors names them."""


C = TypeVar("C", bound="Codec")


class Codec(ABC):
    """A codec of diffusers with one or both of its halves; :meth:`load` makes one.

    Attributes:
        HALVES: Children of the library's model that make a half, ``"encoder"`` and ``"decoder"``.
        DTYPE: Of weights and arithmetic in the published code.
        vae: The library's model.
    """

    HALVES: ClassVar[Mapping[str, tuple[str, ...]]]
    DTYPE: ClassVar[torch.dtype]

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @classmethod
    @ambient.makes_tensors
    def load(
        cls: type[C],
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        encoder: bool = True,
        decoder: bool = True,
        dtype: torch.dtype | None = None,
    ) -> C:
        """Load a codec; all of it is checked, before any data are read.

        Args:
            folder: As the class says.
            device: Where the weights go, straight from the files.
            encoder: Whether something will be encoded; without, that half takes no memory.
            decoder: Whether latents will be decoded.
            dtype: Of weights and arithmetic; the published code's by default.

        Raises:
            CheckpointError: A file is missing, truncated or of another model, or a tensor has NaN or Inf; the message
                names it and the keys.
            ImportError: diffusers is not installed or does not import.
            ValueError: Neither half is asked for, or this machine does not have the device.
        """
        if not (encoder or decoder):
            raise ValueError("encoder or decoder must be True, got False for both")
        vae, entries = cls.check(Path(folder))
        place = usable_device(device)
        used = {*(cls.HALVES["encoder"] if encoder else ()), *(cls.HALVES["decoder"] if decoder else ())}
        for name in [name for name, _ in vae.named_children() if name not in used]:
            delattr(vae, name)
        chosen = [entry for key, entry in entries.items() if key.partition(".")[0] in used]
        like = {entry.key: torch.empty(0, dtype=dtype or cls.DTYPE) for entry in chosen}
        with emptied_on_error(vae):
            TensorReader(place).fill(vae, chosen, like)
        return cls(vae.requires_grad_(False).eval())

    @property
    def module(self) -> nn.Module:
        """What holds its weights."""
        return self.vae

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vae.parameters()).device

    @staticmethod
    @abstractmethod
    def check(folder: Path) -> tuple[Any, dict[str, TensorEntry]]:
        """Make the checks of :meth:`load` that need no weights: config, keys, shapes, and that the files are whole.

        Returns:
            (The library's model on "meta", the entries of its files), which fit each other.

        Raises:
            CheckpointError: As there.
            ImportError: As there.
        """

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


def empty_codec(kind: Any, settings: Mapping[str, Any], file: Path) -> Any:
    """A codec of diffusers' class ``kind`` by the settings of a file, on "meta".

    Raises:
        CheckpointError: The library makes none of them.
    """
    try:
        with torch.device("meta"):
            return kind.from_config(settings)
    except Exception as error:  # whatever the library makes of a configuration that is none
        raise CheckpointError(f"{file}: diffusers makes no codec of it: {said(error)}") from error


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
) -> None:
    """Hold a checkpoint's headers against a model: the same keys, shapes, and floating point.

    Args:
        wanted: The model's state dict, by the checkpoint's keys.
        entries: Of the checkpoint's files.
        source: What the message begins with.
        owner: Whose tensors they are, in the message.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or dtype.
    """
    problems = differences(wanted, entries, owner)
    strange = {key: entry.dtype for key, entry in entries.items() if key in wanted and entry.dtype not in FLOATS}
    problems += [f"{key} must be of floating point, got {dtype}" for key, dtype in strange.items()]
    if problems:
        raise CheckpointError(f"{source}: {listed(sorted(problems))}")


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], owner: str) -> list[str]:
    """In words: what of the tensors that a model wants is missing or of another shape, and what is none of its own."""
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is none of {owner}'s" for key in found if key not in wanted]
    shapes = {key: (list(wanted[key].shape), list(found[key].shape)) for key in wanted.keys() & found.keys()}
    return problems + [f"{key} must be {shape}, got {came}" for key, (shape, came) in shapes.items() if shape != came]
