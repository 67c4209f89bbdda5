"""The parts of the whole path as they are loaded: what can be known of them is checked before the long work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from happyhorse_fast import optional
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.load import check_load, load
from happyhorse_fast.checkpoint.packed import is_packed
from happyhorse_fast.config import LATENT_CHANNELS, PATCH, ModelConfig
from happyhorse_fast.eager.sequence import Clip, check_time_axis
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.pipeline.audio import AudioCodec
from happyhorse_fast.pipeline.audio_file import AUDIO_CHANNELS
from happyhorse_fast.pipeline.company import Company
from happyhorse_fast.pipeline.layout import Layout
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.pipeline.residency import Residency
from happyhorse_fast.pipeline.text import EMBEDDING, TextEncoder, tokens_of
from happyhorse_fast.pipeline.turbo_file import check_turbo, load_turbo
from happyhorse_fast.pipeline.wan import WanCodec

Decoder = Literal["turbo", "wan"]
DECODERS = {"turbo": "turbo_vae", "wan": "video_vae"}


@dataclass(frozen=True)
class Parts:
    """Loads parts onto a device.

    Attributes:
        layout: Where they lie.
        device: Where they go.
        fast: How models are accelerated; None for eager torch in bf16.
        decoder: Of the video.
        residency: Which parts are there.
        company: Ranks that share the models' work; None for one process.
    """

    layout: Layout
    device: torch.device
    fast: FastConfig | None
    decoder: Decoder
    residency: Residency
    company: Company | None = None

    def check(self, request: Request, known: Mapping[str, torch.Tensor | None], *, denoise: bool = True) -> None:
        """Make every check of a run's parts that needs no weights.

        Args:
            request: The run's settings.
            known: Prompt -> its embedding; None where the text encoder has to make it.
            denoise: Whether the models are needed; not where a run goes on from whole latents.

        Raises:
            FileNotFoundError: A part is not there.
            CheckpointError: A part's files are damaged, or of something else.
            ValueError: A prompt is no Unicode, or has no token or too few for a model; or embeddings are of another
                width than a model takes. Names the model.
            ImportError: A library is missing, broken or of a wrong version.
        """
        configs = {name: self.config(name) for name in request.models if denoise}
        if denoise and (request.stages == 2 or request.first == "base"):
            optional.require("diffusers", "UniPC, the solver of the second stage and of the base model,")
        sizes = {prompt: embedding.shape[1:] for prompt, embedding in known.items() if embedding is not None}
        if len(sizes) < len(known):
            _, tokenizer, entries = TextEncoder.check(self.layout.find("text_encoder"))
            for prompt in known.keys() - sizes.keys():
                sizes[prompt] = torch.Size((len(tokens_of(tokenizer, prompt)), entries[EMBEDDING].shape[1]))
        length, width = sizes[request.prompt]
        clip = request.first_tokens
        sequence = Clip(clip.T, clip.H // PATCH[1], clip.W // PATCH[2], clip.audio, length)
        for name, config in configs.items():
            if width != config.text_in_channels:
                raise ValueError(
                    f"the model {name} takes embeddings of width {config.text_in_channels}, text has {width}"
                )
            try:
                check_time_axis(sequence, config.coords_style)
            except ValueError as error:
                raise ValueError(f"prompt is too short for the model {name}: {error}") from error
        if self.decoder == "turbo":
            check_turbo(self.layout.find("turbo_vae"))
        if self.decoder == "wan" or request.image:
            WanCodec.check(self.layout.find("video_vae"))
        AudioCodec.check(self.layout.find("audio_vae"))

    def config(self, name: str) -> ModelConfig:
        """Configuration of a model, with the checks of its files' headers.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: As :func:`checkpoint.load.check_load`; or its latents are
                not those of the published codecs, or ranks cannot share its heads.
        """
        config = check_load(**self._where(name), fast=self.fast)
        if self.company is not None:
            config.require_ranks(self.company.meeting.size)
        if (config.latent_channels, config.audio_in_channels) != (LATENT_CHANNELS, AUDIO_CHANNELS):
            raise CheckpointError(
                f"{self.layout.find(name)}: must take {LATENT_CHANNELS} video and {AUDIO_CHANNELS} audio channels, "
                f"got {config.latent_channels} and {config.audio_in_channels}"
            )
        return config

    def using(self, part: str, layers_on_device: int | None = None) -> AbstractContextManager[Any]:
        """A part on the device: a model, packed layer by layer while it is read, the text encoder, or half a codec.

        Args:
            part: One of :attr:`Request.parts`.
            layers_on_device: Of the text encoder; None for all.
        """
        decoder: tuple[Any, ...] = (load_turbo, "turbo_vae", {})
        if self.decoder == "wan":
            decoder = (WanCodec.load, "video_vae", {"encoder": False})
        others = {
            "text_encoder": (TextEncoder.load, "text_encoder", {"layers_on_device": layers_on_device}),
            "image_encoder": (WanCodec.load, "video_vae", {"decoder": False}),
            "audio_encoder": (AudioCodec.load, "audio_vae", {"decoder": False}),
            "audio_decoder": (AudioCodec.load, "audio_vae", {"encoder": False}),
            "video_decoder": decoder,
        }

        def loaded() -> Any:
            if part in others:
                loader, name, how = others[part]
                return loader(self.layout.find(name), self.device, **how)
            how = {**self._where(part), "device": self.device, "fast": self.fast, "progress": False}
            return load(**how) if self.company is None else self.company.load(load, **how)

        return self.residency.using(part, loaded, how=layers_on_device)

    def _where(self, name: str) -> dict[str, Any]:
        where = self.layout.model(name)
        return where | {"preset": None, "config": None} if is_packed(where["path"]) else where
