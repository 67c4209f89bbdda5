"""Read the inputs of ``happyhorse-fast sample``: text, starting noise, image and recorded noise, of one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Inputs:
    """Content of an inputs file.

    Attributes:
        path: Of the file.
        named: All tensors but recorded noise, such as text, video and audio; names without ``in.``.
        noise: Recorded noise by name.
    """

    path: Path
    named: dict[str, torch.Tensor]
    noise: dict[str, torch.Tensor]

    def replay(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return recorded noise; a sampler takes this as ``noise``.

        Raises:
            ValueError: The file holds noise, but not this one.
        """
        if name not in self.noise:
            raise ValueError(f"{self.path}: holds recorded noise ({', '.join(sorted(self.noise))}), but no {name}")
        return self.noise[name]


def read_inputs(path: Path) -> Inputs:
    """Read an inputs file, or a FIFO to its end; ``in.video`` and ``video`` mean the same.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a safetensors file, or a name is there twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"inputs must be a safetensors file, there is none at {path}")
    try:
        tensors = load_file(path) if path.is_file() else load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"inputs must be a safetensors file, {path} is none: {error}") from error
    noise = {name: value for name, value in tensors.items() if name.startswith("noise.")}
    named: dict[str, torch.Tensor] = {}
    for key in tensors.keys() - noise.keys():
        name = key.removeprefix("in.")
        if name in named:
            raise ValueError(f"{path}: holds both {name} and in.{name}; one is allowed")
        named[name] = tensors[key]
    return Inputs(path, named, noise)
