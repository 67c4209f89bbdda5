"""Embeddings of a run's prompts: from the cache on disk, else of the text encoder, loaded once for all of them."""

from __future__ import annotations

from functools import cached_property

import torch

from happyhorse_fast.pipeline.negative_prompt import NEGATIVE_PROMPT
from happyhorse_fast.pipeline.parts import Parts
from happyhorse_fast.pipeline.progress import Monitor
from happyhorse_fast.pipeline.prompt_cache import PromptCache
from happyhorse_fast.pipeline.request import Request


class Embeddings:
    """The embeddings that one run needs: of its prompt and, for the base model, of what it is guided away from."""

    def __init__(self, parts: Parts, request: Request) -> None:
        self.parts = parts
        negative = [request.negative_prompt or NEGATIVE_PROMPT] if request.first == "base" else []
        self.prompts = [request.prompt, *negative]

    @cached_property
    def _cache(self) -> PromptCache:
        return PromptCache(self.parts.layout.find("text_encoder"))

    @cached_property
    def _known(self) -> dict[str, torch.Tensor]:
        found = {prompt: self._cache.get(prompt) for prompt in self.prompts}
        return {prompt: embedding for prompt, embedding in found.items() if embedding is not None}

    @property
    def need_encoder(self) -> bool:
        """Whether one of them has to be made.

        Raises:
            FileNotFoundError: The text encoder, of whose files the cache is, is not there.
            CheckpointError: Its files are damaged.
        """
        return len(self._known) < len(set(self.prompts))

    def get(self, monitor: Monitor, layers_on_device: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [1, L, Ct] float32 on the CPU, of the prompt and of the negative one, None where there is none."""
        if self.need_encoder:
            with self.parts.text_encoder(layers_on_device) as encoder:
                monitor.loaded()
                for prompt in self.prompts:
                    if prompt not in self._known:
                        self._known[prompt] = encoder.encode(prompt)
                        self._cache.put(prompt, self._known[prompt])
        monitor.step(1, 1)
        made = [self._known[prompt] for prompt in self.prompts]
        return made[0], made[1] if len(made) > 1 else None
