"""Clips to train on: drawn, encoded, and kept for a while."""

from __future__ import annotations

import random

import torch
from batched import Batch
from world import draw_scene, encode_audio, render_audio, render_video

from happyhorse_fast.pony import codec as codecs
from happyhorse_fast.pony.generate import AUDIO_SHAPE, VIDEO_SHAPE
from happyhorse_fast.pony.prompt import TEXT_CHANNELS, TEXT_TOKENS, Prompt, all_prompts, encode_text, held_out_prompts
from happyhorse_fast.pony.weights import load_codecs


def training_prompts() -> list[Prompt]:
    """List the prompts that are trained on, in the order of :func:`all_prompts`."""
    held_out = set(held_out_prompts())
    return [prompt for prompt in all_prompts() if prompt not in held_out]


class Clips:
    """Draws latents and texts of clips from a pool that takes in new clips all the time.

    Drawing a clip costs half of what a training step on it costs (27 and 57 ms of one core), so each serves in several
    steps, every time with other noise.

    Args:
        seed: Of prompts and of what they leave open.
        first: Clips in the pool to begin with.
        fresh: New clips per batch.
        size: Clips at which the pool begins to drop its oldest.
    """

    def __init__(self, seed: int, first: int, fresh: int = 2, size: int = 2048) -> None:
        self.video, self.audio = load_codecs()
        self.rng = random.Random(seed)
        self.prompts = training_prompts()
        self.texts = {prompt: encode_text(str(prompt)) for prompt in self.prompts}
        self.fresh, self.size, self.drawn = fresh, size, 0
        shapes = (VIDEO_SHAPE[1:], AUDIO_SHAPE[1:], (TEXT_TOKENS, TEXT_CHANNELS))
        self.pool = [torch.empty(size, *shape) for shape in shapes]
        while self.drawn < first:
            self.take_in(8)

    def take_in(self, count: int) -> None:
        """Draw new clips into the pool."""
        scenes = [draw_scene(self.rng.choice(self.prompts), self.rng) for _ in range(count)]
        video = codecs.encode_video(self.video, render_video(scenes))
        audio = encode_audio(self.audio, render_audio(scenes))
        text = torch.cat([self.texts[scene.prompt] for scene in scenes])
        slots = torch.arange(self.drawn, self.drawn + count) % self.size
        for pool, new in zip(self.pool, (video, audio, text), strict=True):
            pool[slots] = new
        self.drawn += count

    def draw(self, count: int) -> Batch:
        """A batch of clips, some of them new."""
        self.take_in(self.fresh)
        chosen = torch.tensor(self.rng.sample(range(min(self.drawn, self.size)), count))
        video, audio, text = (pool[chosen] for pool in self.pool)
        return video, audio, text
