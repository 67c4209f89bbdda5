"""The text encoder: a prompt into the embedding that conditions a clip, by the encoder of T5Gemma in transformers.

As the public implementation runs it under transformers 4.56: the raw prompt without special tokens, and attention
without the soft cap of the configuration, which 4.56's default attention leaves out and 5.x applies (published results
come from without). The decoder half is neither read nor needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from happyhorse_fast import ambient, optional
from happyhorse_fast.arguments import CheckpointError, listed, require_finite, require_whole
from happyhorse_fast.checkpoint.header import INDEX_FILE, SINGLE_FILE, TensorEntry, read_file, read_index
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.checkpoint.stream import TensorReader, emptied_on_error
from happyhorse_fast.pipeline.codec_files import CONFIG, read_json, require_tensors
from happyhorse_fast.tokens import TEXT_TOKENS

TOKENIZER_FILE = "tokenizer.json"
PREFIXES = ("model.encoder.", "encoder.")
"""Of the encoder's keys: in the published files, and where the encoder alone was saved."""
EMBEDDING = "embed_tokens.weight"
ATTENTION = "without_soft_cap"
"""transformers' name for its own fused attention, which takes no soft cap and which it refuses by its usual name."""


def text_files(folder: str | Path) -> list[Path]:
    """Files of a folder that the encoder needs: configuration, tokenizer, index, and the shards with its weights.

    Raises:
        CheckpointError: One is missing, or the index is corrupt or names no tensor of the encoder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder of a text encoder")
    small = [folder / name for name in (CONFIG, TOKENIZER_FILE)]
    index = folder / INDEX_FILE
    if index.exists():
        small.append(index)
        shards = sorted({folder / name for name in _of_encoder(read_index(index), index).values()})
    else:
        shards = [folder / SINGLE_FILE]
    absent = [file.name for file in (*small, *shards) if not file.is_file()]
    if absent:
        raise CheckpointError(f"{folder}: a text encoder needs {listed(absent)}, which is not there")
    return [*small, *shards]


class TextEncoder:
    """The encoder on a device; :meth:`load` makes one, :meth:`check` says beforehand whether it would.

    The embedding stays in its file, which is asked for a prompt's rows alone: 1.8 of 18.5 GB that are not moved.

    Attributes:
        module: What holds the weights that are on the device.
        tokenizer: Of prompts, as :func:`tokens_of` takes it.
    """

    def __init__(
        self, parts: tuple[Any, Any, Mapping[str, TensorEntry]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module, self.tokenizer, self._entries = parts
        self._device, self._dtype = device, dtype
        self._reader = TensorReader(device)
        self._streamed: list[nn.Module] = []

    @staticmethod
    def check(folder: str | Path) -> tuple[Any, Any, Mapping[str, TensorEntry]]:
        """All that can be known before weights are read; seconds, most of them transformers' import.

        Returns:
            (the encoder on "meta", the tokenizer, every tensor by the encoder's own key, in the order of the files).

        Raises:
            ImportError: transformers is missing, broken or of another version.
            CheckpointError: A file is missing, truncated or foreign; or a tensor is missing, unknown, of another shape
                or no floats. The message names file and key.
        """
        optional.require("transformers", "the text encoder")
        files = text_files(folder)
        with torch.device("meta"):
            model = _empty_encoder(Path(folder))
        entries = _entries(files)
        wanted = {key.removeprefix(PREFIXES[1]): value for key, value in model.state_dict().items()}
        require_tensors(wanted, entries, f"{folder}: text encoder", owner="the encoder")
        return model, _tokenizer(Path(folder)), entries

    @classmethod
    @ambient.makes_tensors
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.bfloat16,
        layers_on_device: int | None = None,
    ) -> TextEncoder:
        """Read the weights in pieces of 16 MiB straight to the device.

        Args:
            folder: With ``config.json``, ``tokenizer.json`` and the shards of the encoder.
            device: Where it runs.
            dtype: Of weights and activations; published results are of bfloat16.
            layers_on_device: How many layers stay on the device; the rest are read from their files whenever they are
                needed, one at a time, with the same result. None: all. 0: the weights of one layer at a time, 0.4 of
                16.6 GB.

        Raises:
            ImportError: As :meth:`check`.
            CheckpointError: As :meth:`check`; or NaN or Inf in a tensor.
            TypeError: ``layers_on_device`` is no whole number.
            ValueError: No such device or dtype, or ``layers_on_device`` is below 0.
        """
        place = usable_device(device)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
        if layers_on_device is not None:
            require_whole("layers_on_device", layers_on_device, 0)
        encoder = cls(cls.check(folder), place, dtype)
        with emptied_on_error(encoder.module):
            encoder._fill(layers_on_device)
        return encoder

    @ambient.independent
    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """The embedding of a prompt: [1, L, channels] float32 on the CPU, rounded to float16 as in the published code.

        L is the number of tokens, at most 640: the encoder reads all of them, the first 640 rows are kept.

        Raises:
            TypeError: ``prompt`` is no text.
            ValueError: It has no token, or is no Unicode.
            NonFiniteError: NaN, or numbers beyond float16.
        """
        numbers = tokens_of(self.tokenizer, prompt)
        rows = self._rows(numbers)
        everything = torch.ones(1, len(numbers), dtype=torch.long, device=self._device)
        try:
            hidden = self.module(inputs_embeds=rows[None], attention_mask=everything).last_hidden_state
        finally:  # a hook alone is not called at Ctrl-C
            for layer in self._streamed:
                layer.to("meta")
        embedding = hidden[:, :TEXT_TOKENS].half().float().cpu()
        require_finite("embedding of the prompt", embedding)
        return embedding

    def _rows(self, numbers: list[int]) -> torch.Tensor:
        """[tokens, channels] of the embedding, read from its file."""
        entry = self._entries[EMBEDDING]
        rows, width = entry.shape
        if max(numbers) >= rows:
            raise CheckpointError(
                f"{entry.file}: {EMBEDDING} has {rows} rows, the tokenizer gives token {max(numbers)}: they are of "
                "different models"
            )
        nbytes = entry.nbytes // rows
        reader = TensorReader(torch.device("cpu"))  # rows are small: to a GPU they go together, with one wait
        found: dict[int, torch.Tensor] = {}
        with entry.file.open("rb", buffering=0) as stream:
            for number in sorted(set(numbers)):
                row = dataclasses.replace(entry, shape=(width,), start=entry.start + number * nbytes, nbytes=nbytes)
                found[number] = reader.read(stream, row, self._dtype)
        return torch.stack([found[number] for number in numbers]).to(self._device)

    def _fill(self, layers_on_device: int | None) -> None:
        model: nn.Module = self.module.encoder
        # The frequencies are in no file. On the CPU and in float32, as the library computes them when it loads.
        model.rotary_emb = type(model.rotary_emb)(model.config).to(self._device)
        layers: Any = model.layers
        kept = len(layers) if layers_on_device is None else min(layers_on_device, len(layers))
        away = tuple(f"layers.{number}." for number in range(kept, len(layers)))
        here = {key: entry for key, entry in self._entries.items() if key != EMBEDDING and not key.startswith(away)}
        self._read(model, here)
        for number, prefix in zip(range(kept, len(layers)), away, strict=True):
            self._stream(
                layers[number],
                {key.removeprefix(prefix): entry for key, entry in self._entries.items() if key.startswith(prefix)},
            )

    def _stream(self, layer: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
        """Let a layer's weights be there while it runs only."""

        def read(*_: object) -> None:
            self._read(layer, entries)

        def forget(*_: object) -> None:
            layer.to("meta")

        layer.register_forward_pre_hook(read)
        layer.register_forward_hook(forget)
        self._streamed.append(layer)

    def _read(self, module: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
        keyed = [dataclasses.replace(entry, key=key) for key, entry in entries.items()]
        like = {key: torch.empty(0, dtype=self._dtype, device="meta") for key in entries}
        self._reader.fill(module, keyed, like)


def _empty_encoder(folder: Path) -> Any:
    """The encoder without weights, its attention without the soft cap."""
    from transformers import AttentionInterface, AttentionMaskInterface, T5GemmaConfig, T5GemmaEncoderModel

    file = folder / CONFIG
    found = read_json(file).get("model_type")
    if found != "t5gemma":
        raise CheckpointError(f"{file}: model_type must be 't5gemma', the text encoder's; got {found!r}")
    AttentionInterface.register(ATTENTION, AttentionInterface()["sdpa"])
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
    try:
        config = T5GemmaConfig.from_pretrained(folder, local_files_only=True)
        config.is_encoder_decoder = False
        config.encoder.attn_logit_softcapping = None
        model = T5GemmaEncoderModel(config).eval().requires_grad_(False)
        model.encoder.set_attn_implementation(ATTENTION)
    except Exception as error:  # whatever the library makes of a configuration that is none
        raise CheckpointError(f"{file}: transformers makes no encoder of it: {optional.said(error)}") from error
    return model


def _tokenizer(folder: Path) -> Any:
    """As the file says, which is what transformers 4.56 goes by; 5.x makes a new one of its vocabulary."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # which is what the library raises, whatever is wrong
        raise CheckpointError(f"{file}: no tokenizer can be made of it: {optional.said(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokens_of(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt as it is: no template, no special tokens, nothing cut off.

    Raises:
        TypeError: ``prompt`` is no text.
        ValueError: It has no token, or is no Unicode.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be text, got {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half of a pair, as bytes of a command line that are no UTF-8 become
        raise ValueError(f"prompt must be Unicode, got {prompt[error.start : error.end]!r} in it") from None
    numbers = list(tokenizer.encode(prompt, add_special_tokens=False).ids)
    if not numbers:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    return numbers


def _of_encoder(keys: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Those of the encoder, as they are in the files."""
    for prefix in PREFIXES:
        found = {key: value for key, value in keys.items() if key.startswith(prefix)}
        if found:
            return found
    raise CheckpointError(f"{file}: names no tensor of an encoder, {' or '.join(f'{p}*' for p in PREFIXES)}")


def _entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Tensors of the encoder by its own keys."""
    index = next((file for file in files if file.name == INDEX_FILE), None)
    shards = {file.name: read_file(file) for file in files if file.suffix == ".safetensors"}
    if index is None:
        (name,) = shards
        where = dict.fromkeys(_of_encoder(shards[name], files[-1]), name)
    else:
        where = _of_encoder(read_index(index), index)
    astray = [f"{key} in {name}" for key, name in where.items() if key not in shards[name]]
    if astray:
        raise CheckpointError(f"{index}: names tensors that are not there: {listed(astray)}")
    entries = {key: entry for header in shards.values() for key, entry in header.items()}
    extra = [key for key in entries if key.startswith(PREFIXES) and key not in where]
    unnamed = [f"{key} in {entries[key].file.name}" for key in extra]
    if index is not None and unnamed:
        raise CheckpointError(f"{index}: does not name tensors that are there: {listed(unnamed)}")
    prefix = next(prefix for prefix in PREFIXES if next(iter(where)).startswith(prefix))
    return {key.removeprefix(prefix): entry for key, entry in entries.items() if key in where}
