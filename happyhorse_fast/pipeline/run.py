"""One clip on its way, a stage after another: text, picture, sound, denoising, super-resolution, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.pipeline.audio_file import AUDIO_CHANNELS
from happyhorse_fast.pipeline.clip import Clip
from happyhorse_fast.pipeline.company import Work
from happyhorse_fast.pipeline.host_frames import host_frames
from happyhorse_fast.pipeline.keeping import Keeper
from happyhorse_fast.pipeline.latents import Latents
from happyhorse_fast.pipeline.memory_plan import PipelinePlan
from happyhorse_fast.pipeline.mp4 import Mp4Writer
from happyhorse_fast.pipeline.parts import Parts
from happyhorse_fast.pipeline.placing import predicted
from happyhorse_fast.pipeline.progress import Callback, Monitor
from happyhorse_fast.pipeline.prompt_cache import PromptCache
from happyhorse_fast.pipeline.request import AUDIO, DENOISED, FPS, IMAGE, RESOLVED, SOUND, TEXT, VIDEO, Request
from happyhorse_fast.pipeline.sound import PLAYED_RATE, resample
from happyhorse_fast.sampler import StepInfo, sample, super_resolve

GUIDANCE = 5.0
"""Of the base model, as published."""
Write = Callable[[int, torch.Tensor], object]
"""(number of the first frame, frames [n, H, W, 3] uint8 on the CPU)."""


class Run:
    """The stages of one clip, and its noise.

    All noise is from one generator, in the order in which the public implementation draws it: audio, then video, then
    per distilled step video and audio, of the last step too, whose noise has weight 0; then video and audio of the
    second stage. A posterior that a given sound is sampled from stands in the audio's place.

    Args:
        request: What is asked for.
        parts: What makes it.
        placing: How they lie on the device; parts that are not to stay leave it now.
        callback: Called with every step.
        shown: Whether to show a bar on standard error.
        begun: What an earlier run has made, to go on from.

    Raises:
        ValueError: The noise of ``begun`` was drawn on another kind of device.
    """

    def __init__(
        self,
        request: Request,
        parts: Parts,
        placing: PipelinePlan,
        *,
        callback: Callback | None = None,
        shown: bool = False,
        begun: Latents | None = None,
    ) -> None:
        self.request, self.parts, self.placing, self.begun = request, parts, placing, begun
        where = parts.device if request.noise == "device" else torch.device("cpu")
        self.generator = torch.Generator(where).manual_seed(request.seed)
        parts.residency.keep_only(placing.kept)
        stages = list(request.parts)
        ahead = stages if begun is None else stages[stages.index(begun.done) + 1 :]
        self.monitor = Monitor(parts.device, predicted(parts, placing, ahead), callback, shown)
        if begun is None or begun.whole:
            return
        if begun.noise_device != where.type:
            raise ValueError(
                f"resume must go on with noise of {begun.noise_device}, on which it began; this run's is of "
                f'{where.type} (noise="cpu" goes on anywhere)'
            )
        self.generator.set_state(begun.noise)

    def denoised(
        self,
        known: Mapping[str, torch.Tensor | None],
        pictures: list[torch.Tensor] | None,
        sound: torch.Tensor | None,
        keeper: Keeper,
    ) -> Latents:
        """All latents; those of each stage are kept as soon as they are there.

        Args:
            known: As :meth:`encode_text` takes it.
            pictures: First picture at the size of each stage, [1, 3, 1, H, W] float32 in -1..1; or None.
            sound: [samples] float32 at 51,200 Hz, or None.
            keeper: Keeps them.
        """
        found = self.begun
        if found is None:
            text, *null_text = self.encode_text(known)
            images = [None] if pictures is None else self.encode_image(pictures)
            held = None if sound is None else self.encode_sound(sound)
            video, audio = self._together("denoise", text, null_text[0] if null_text else None, images[0], held)
            found = self._latents(DENOISED, video, audio, text, images[-1])
        keeper.save(found)
        if not found.whole:
            video = self._together("resolve", found)
            found = self._latents(RESOLVED, video, found.audio, found.text, found.image)
            keeper.save(found)
        if self.parts.company is not None:
            self.parts.company.tell(None)
        return found

    def decoded(self, latents: Latents, target: Path | None) -> Clip:
        """Frames and samples of latents; frames go to the file ``target`` where there is one."""
        samples = self.decode_audio(latents.audio)
        height, width = self.request.last_tokens.pixels
        frames: torch.Tensor | None = None
        if target is None:
            every = frames = torch.empty(self.request.frames, height, width, 3, dtype=torch.uint8, device="cpu")
            self.decode_video(latents.video, lambda first, some: every[first : first + len(some)].copy_(some))
        else:
            with Mp4Writer(target, width, height, fps=FPS, sample_rate=PLAYED_RATE) as writer:
                self.decode_video(latents.video, lambda _, some: writer.add(some))
                writer.add_sound(samples)
        return Clip(self.request, frames, samples, latents, tuple(self.monitor.costs), self.placing, target)

    def encode_text(self, known: Mapping[str, torch.Tensor | None]) -> list[torch.Tensor]:
        """Embeddings [1, L, Ct] float32 on the CPU of the request's prompts.

        Args:
            known: Prompt -> its embedding; None where the encoder has to make it, which is loaded once for all.
        """
        found = {prompt: embedding for prompt, embedding in known.items() if embedding is not None}
        with self.monitor.stage(TEXT):
            if len(found) < len(known):
                cache = PromptCache(self.parts.layout.find("text_encoder"))
                with self.parts.using("text_encoder", self.placing.layers_on_device) as encoder:
                    self.monitor.loaded()
                    for prompt in [prompt for prompt in known if prompt not in found]:
                        found[prompt] = encoder.encode(prompt)
                        cache.put(prompt, found[prompt])
            self.monitor.step(1, 1)
        return [found[prompt] for prompt in self.request.prompts]

    def encode_image(self, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
        """Latents [1, 48, 1, H / 16, W / 16] of the first picture at several sizes, [1, 3, 1, H, W], on the CPU."""
        with self._stage(IMAGE) as codec:
            made = []
            for step, pixels in enumerate(pictures, start=1):
                made.append(codec.encode(pixels.to(self.parts.device)).cpu())
                self.monitor.step(step, len(pictures))
        return made

    def encode_sound(self, sound: torch.Tensor) -> torch.Tensor:
        """Latent [1, A, 64] of a given sound, a sample of its posterior, on the device."""
        with self._stage(SOUND) as codec:
            latent = codec.encode(sound, self.request.seconds, self.generator)
            self.monitor.step(1, 1)
        return latent

    def denoise(
        self,
        text: torch.Tensor,
        null_text: torch.Tensor | None,
        image: torch.Tensor | None,
        sound: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First stage: (video [1, 48, T, H, W], audio [1, A, 64]) on the device."""
        tokens, place = self.request.first_tokens, self.parts.device
        with self._stage(DENOISED) as model:
            audio = self._noise(1, tokens.audio, AUDIO_CHANNELS) if sound is None else sound.to(place)
            video = self._noise(1, LATENT_CHANNELS, tokens.T, tokens.H, tokens.W)
            how: dict[str, Any] = {} if null_text is None else {"guidance": GUIDANCE, "null_text": null_text.to(place)}
            video, audio = sample(
                model,
                video,
                audio,
                text.to(place),
                image=None if image is None else image.to(place),
                hold_audio=sound is not None,
                noise=self.generator,
                callback=self._stepped,
                progress=False,
                **how,
            )
            if null_text is None:  # of the last step, which the sampler does not draw
                self._noise(*video.shape), self._noise(*audio.shape)
        return video, audio

    def resolve(self, latents: Latents) -> torch.Tensor:
        """Second stage: video [1, 48, T, H, W] at the full size, on the device."""
        tokens, place = self.request.last_tokens, self.parts.device
        with self._stage(RESOLVED) as model:
            return super_resolve(
                model,
                latents.video.to(place),
                latents.audio.to(place),
                latents.text.to(place),
                (tokens.H, tokens.W),
                image=None if latents.image is None else latents.image.to(place),
                noise=self.generator,
                callback=self._stepped,
                progress=False,
                history_on_host=self.placing.history_on_host,
            )

    def decode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """Samples [2, m] at 44,100 Hz, float32 on the CPU."""
        with self._stage(AUDIO) as codec:
            samples = resample(codec.decode(audio.to(self.parts.device)).cpu())
            self.monitor.step(1, 1)
        return samples

    def decode_video(self, video: torch.Tensor, write: Write) -> None:
        """Decode window by window; ``write`` gets the frames of one while the next are decoded."""
        total = 4 * video.shape[2] - 3
        with self._stage(VIDEO) as decoder:
            done = 0
            for frames in host_frames(decoder, video.to(self.parts.device), self.placing.tiles):
                write(done, frames)
                done += len(frames)
                self.monitor.step(done, total)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Any]:
        """A stage, with its part on the device."""
        with self.monitor.stage(name), self.parts.using(self.request.parts[name]) as part:
            self.monitor.loaded()
            yield part

    def _together(self, stage: str, *given: Any) -> Any:
        """A stage that denoises, by its method's name; all ranks are told of it."""
        if self.parts.company is not None:
            here = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in given)
            self.parts.company.tell(Work(stage, self.request, self.placing, self.generator.get_state(), here))
        return getattr(self, stage)(*given)

    def _latents(
        self, done: str, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None
    ) -> Latents:
        state, place = self.generator.get_state(), self.generator.device.type
        return Latents(self.request, done, video.cpu(), audio.cpu(), text, image, state, place)

    def _noise(self, *shape: int) -> torch.Tensor:
        """Standard normal float32 [*shape] on the run's device."""
        made = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return made.to(self.parts.device)

    def _stepped(self, info: StepInfo) -> None:
        self.monitor.step(info.step, info.steps, info.video, info.audio)
