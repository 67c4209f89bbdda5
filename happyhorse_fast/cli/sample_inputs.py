"""What ``happyhorse-fast sample`` reads: text, starting noise, image and recorded noise, of one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Inputs:
    """What an inputs file holds.

    Attributes:
        path: Of the file.
        named: text, video, audio, null_text and whatever else has no other meaning, without ``in.``.
        noise: Recorded noise by name.
        ignored: Names that no option asked for.
    """

    path: Path
    named: dict[str, torch.Tensor]
    noise: dict[str, torch.Tensor]
    ignored: set[str]

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor by name, None where there is none; it is then no longer ignored."""
        self.ignored.discard(name)
        return self.named.get(name)

    def replay(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Recorded noise, as a sampler's ``noise``.

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
    return Inputs(path, named, noise, set(named))


def drawn(seed: int) -> Any:
    """Noise by name from a seed, alike on any device, as a sampler's ``noise``."""
    from happyhorse_fast import golden

    return lambda name, shape: golden.draw(seed, name, shape)
