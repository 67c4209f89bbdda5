"""Embeddings of prompts on this machine's disk, so that a prompt that was seen before loads no encoder.

One file per model and prompt, in float16, which is what an embedding is rounded to; at most 4.6 MB each. A name is a
digest: the prompt itself is not stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.header import read_file
from happyhorse_fast.checkpoint.save import write_safetensors
from happyhorse_fast.files import replacing
from happyhorse_fast.ops.runtime.cache_folder import cache_folder
from happyhorse_fast.pipeline.text import ATTENTION, text_files
from happyhorse_fast.tokens import TEXT_TOKENS

logger = logging.getLogger(__name__)

SWITCH = "HAPPYHORSE_FAST_PROMPT_CACHE"
"""Environment variable; ``0`` keeps no embeddings. Where they are kept is for ``HAPPYHORSE_FAST_CACHE`` to say."""
MOST_ENTRIES = 200
"""Of all models together; the ones longest unused go first. At most 0.9 GB."""
KEY = "embedding"
DIGEST = "sha256"
_SAMPLES = 8
_SAMPLE_BYTES = 4096


class PromptCache:
    """Embeddings by one text encoder.

    A folder that cannot be read or written, or an entry that is not what was stored, costs a warning and the time of
    encoding again, never an error.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Of the encoder in ``folder``, computing in ``dtype``.

        Raises:
            CheckpointError: The encoder's files are missing or damaged.
        """
        self._model = encoder_digest(folder, dtype)

    def get(self, prompt: str) -> torch.Tensor | None:
        """The embedding [1, L, channels] of a prompt in float32 on the CPU; None where it has to be made."""
        if not _wanted():
            return None
        file: Path | None = None
        try:
            file = self._file(prompt)
            found = _read(file)
            os.utime(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            where = "the prompt cache" if file is None else str(file)
            logger.warning("%s cannot be used, the prompt is encoded again: %s", where, error)
            return None
        return found

    def put(self, prompt: str, embedding: torch.Tensor) -> None:
        """Keep an embedding as :meth:`TextEncoder.encode` gives it."""
        if not _wanted():
            return
        try:
            file = self._file(prompt)
            with replacing(file) as partial:
                partial.touch(0o600)
                stored = embedding.half().contiguous()
                write_safetensors({KEY: stored}, partial, {DIGEST: _digest(stored)})
            _forget(file.parent)
        except OSError as error:
            logger.warning("the embedding of a prompt cannot be kept: %s", error)

    def _file(self, prompt: str) -> Path:
        digest = hashlib.sha256(self._model.encode() + prompt.encode("utf-8", "surrogatepass")).hexdigest()
        folder = cache_folder() / "prompts"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{digest}.safetensors"


def encoder_digest(folder: str | Path, dtype: torch.dtype) -> str:
    """SHA-256 of what an embedding depends on besides the prompt; milliseconds, weights are only sampled.

    Of configuration, tokenizer and index every byte; of each file of weights its header, which has every name, shape
    and place, and 8 samples of 4 KiB; and how it is computed.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    digest = hashlib.sha256(f"1 {ATTENTION} {dtype} {TEXT_TOKENS}".encode())
    for file in text_files(folder):
        digest.update(f"\0{file.name}\0".encode())
        try:
            for piece in _pieces(file):
                digest.update(piece)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    if file.suffix != ".safetensors":
        yield file.read_bytes()
        return
    first = min(entry.start for entry in read_file(file).values())
    size = file.stat().st_size
    with file.open("rb") as stream:
        yield stream.read(first)
        for sample in range(_SAMPLES):
            stream.seek(first + (size - first) * sample // _SAMPLES)
            yield stream.read(_SAMPLE_BYTES)


def _read(file: Path) -> torch.Tensor:
    try:
        with safe_open(file, "pt") as opened:
            stored, written = opened.get_tensor(KEY), (opened.metadata() or {}).get(DIGEST)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if written != _digest(stored):
        raise ValueError("its digest is not that of what was written")
    return stored.float()


def _digest(stored: torch.Tensor) -> str:
    return hashlib.sha256(stored.view(torch.uint8).numpy().tobytes()).hexdigest()


def _forget(folder: Path) -> None:
    """Remove the entries that were not used for longest."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_ENTRIES:]:
        file.unlink(missing_ok=True)


def _wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"
