"""Latents of a run on disk after each stage: whatever fails later, nothing that took long is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.save import write_safetensors
from happyhorse_fast.files import replacing
from happyhorse_fast.pipeline.request import DENOISED, RESOLVED, Request

FORMAT = "1"
_KIND = "happyhorse_fast latents"


@dataclass(frozen=True)
class Latents:
    """Where a run stands between two stages. On the CPU.

    Attributes:
        request: Settings of the run.
        done: Last stage that is in them, :data:`DENOISED` or :data:`RESOLVED`.
        video: [1, 48, T, H, W] float32.
        audio: [1, A, 64] float32.
        text: [1, L, Ct] float32, embedding of the prompt.
        image: [1, 48, 1, H, W] float32, latent of the first picture at the size of the last stage; None without.
        noise: State of the generator, uint8.
        noise_device: Type of the device that the generator is on.
    """

    request: Request
    done: str
    video: torch.Tensor
    audio: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor | None
    noise: torch.Tensor
    noise_device: str

    @property
    def whole(self) -> bool:
        """Whether every stage that denoises is done."""
        return self.done == RESOLVED or self.request.stages == 1

    def save(self, path: Path) -> None:
        """Write them as a safetensors file, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        tensors = {"video": self.video, "audio": self.audio, "text": self.text, "noise": self.noise}
        if self.image is not None:
            tensors["image"] = self.image
        said = {
            "kind": _KIND,
            "format": FORMAT,
            "done": self.done,
            "noise_device": self.noise_device,
            "request": json.dumps(self.request.to_dict()),
        }
        with replacing(path) as partial:
            write_safetensors({key: value.contiguous() for key, value in tensors.items()}, partial, said, named=path)


def read_latents(path: str | Path) -> Latents:
    """Read what :meth:`Latents.save` wrote.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: Not a whole file of latents; says why.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"resume must be a file of latents that a run left, there is none at {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            said: Mapping[str, str] = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
        if said.get("kind") != _KIND or said.get("format") != FORMAT:
            raise CheckpointError(f"resume must be a file of latents that a run left (format {FORMAT}), {file} is none")
        request = Request(**json.loads(said["request"]))
        found = Latents(
            request,
            said["done"],
            tensors["video"],
            tensors["audio"],
            tensors["text"],
            tensors.get("image"),
            tensors["noise"],
            said["noise_device"],
        )
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"resume: {file} is not a whole file of latents: {type(error).__name__}: {error}"
        ) from error
    if found.done not in (DENOISED, RESOLVED):
        raise CheckpointError(f"resume: {file} must be of {DENOISED} or {RESOLVED}, got {found.done!r}")
    size = request.first_tokens if found.done == DENOISED else request.last_tokens
    shape = (1, 48, size.T, size.H, size.W)
    if tuple(found.video.shape) != shape:
        came = f"{list(found.video.shape)}, its settings ask for {list(shape)}"
        raise CheckpointError(f"resume: {file} holds latents {came}")
    return found
