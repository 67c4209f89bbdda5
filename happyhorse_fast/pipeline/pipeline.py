"""``Pipeline``: from a prompt to a clip with sound, over local folders of the published parts."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from happyhorse_fast import optional
from happyhorse_fast.arguments import require_choice
from happyhorse_fast.checkpoint.load import usable_device
from happyhorse_fast.checkpoint.packed import is_packed, packed_config
from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.fast.config import AttentionPrecision, FastConfig, Precision
from happyhorse_fast.fast.parallelize import require_mesh
from happyhorse_fast.files import is_special, real_path, require_target
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.pipeline.clip import Clip
from happyhorse_fast.pipeline.company import Company, tells_faults
from happyhorse_fast.pipeline.image import image_pixels, open_image
from happyhorse_fast.pipeline.keeping import Keeper
from happyhorse_fast.pipeline.latents import Latents, read_latents
from happyhorse_fast.pipeline.layout import PARTS, Layout, read_layout
from happyhorse_fast.pipeline.memory_plan import Placement
from happyhorse_fast.pipeline.mp4 import require_mp4
from happyhorse_fast.pipeline.parts import DECODERS, Decoder, Parts
from happyhorse_fast.pipeline.placing import place
from happyhorse_fast.pipeline.preview import Preview, fit_preview
from happyhorse_fast.pipeline.progress import Callback
from happyhorse_fast.pipeline.prompt_cache import PromptCache
from happyhorse_fast.pipeline.request import FPS, Request, require_rate
from happyhorse_fast.pipeline.residency import Residency
from happyhorse_fast.pipeline.run import Run
from happyhorse_fast.pipeline.sound import read_sound


class Pipeline:
    """Turns prompts into clips with sound; :meth:`from_pretrained` makes one.

    Attributes:
        parts: Where the parts lie and how they run.
        placement: As :meth:`from_pretrained` takes it.
    """

    def __init__(self, parts: Parts, placement: Placement) -> None:
        self.parts, self.placement = parts, placement

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        precision: Precision | Literal["auto"] | None = "auto",
        attention: AttentionPrecision | None = None,
        device: torch.device | str | None = None,
        text_folder: str | Path | None = None,
        video_folder: str | Path | None = None,
        audio_folder: str | Path | None = None,
        decoder: Decoder = "turbo",
        placement: Placement = "auto",
        on_host: bool = True,
        mesh: Any = None,
        shard_weights: bool = False,
    ) -> Pipeline:
        """A pipeline over local folders; nothing is loaded yet, and nothing is ever downloaded.

        Args:
            folder: Holds the published parts: ``distill`` (or ``base``), ``540p_sr``, ``1080p_sr``, ``turbo_vae``, and
                ``t5gemma-9b-9b-ul2``, ``Wan2.2-TI2V-5B-Diffusers``, ``stable-audio-open-1.0``. Where something lies
                elsewhere or is of another configuration, a ``pipeline.json`` in it says so (docs/PIPELINE.md). Models
                may also be folders of packed weights.
            precision: Of the models' products: ``"fp8"``, ``"int8"``, ``"bf16"``; None for eager torch in bf16.
                ``"auto"``: that of packed weights where the folder has some, else int8 on sm_80 to sm_90, fp8 from
                sm_100 on (docs/decisions/0015); eager torch on a CPU.
            attention: Precision of attention, by default as :class:`FastConfig`'s.
            device: Such as ``"cuda"``; by default that where there is one, else the CPU.
            text_folder: The text encoder's folder, in place of the published place.
            video_folder: Likewise, of the video autoencoder: the folder ``vae``.
            audio_folder: Likewise, of the audio autoencoder.
            decoder: Of the video: ``"turbo"``, as the public implementation decodes; or ``"wan"``, the autoencoder's
                own, with four times the work.
            placement: Whether all parts stay on the device once loaded (``"resident"``), or one is there at a time
                (``"sequential"``); ``"auto"`` keeps as many as the card is large enough for.
            on_host: Whether the others wait in host memory, pinned for a GPU, where half of it is enough, so that the
                next clip copies what this one reads and packs. False where there is no next clip; never with ``mesh``.
            mesh: Device mesh of ranks that share the models' work, as :func:`parallelize` takes it; ``device`` is then
                this rank's own. Rank 0 calls the pipeline, the others :meth:`follow`, as often.
            shard_weights: Keep a share of every model's weights on a rank, not all of them; with ``mesh``.

        Raises:
            FileNotFoundError: No such folder, or no model in it; says where they are published.
            CheckpointError: Its ``pipeline.json`` is no good.
            ValueError: An argument is not among the allowed values, or this machine has no such device.
            TypeError: ``mesh`` is no DeviceMesh.
        """
        if mesh is not None:
            require_mesh(mesh)
        elif shard_weights:
            raise ValueError("shard_weights must come with mesh, got mesh=None")
        require_choice("decoder", decoder, DECODERS)
        require_choice("placement", placement, get_args(Placement))
        where = usable_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        given = {"text_encoder": text_folder, "video_vae": video_folder, "audio_vae": audio_folder}
        layout = read_layout(folder, given)
        chosen_precision = _precision_on(where, layout) if precision == "auto" else precision
        if chosen_precision is None and attention is not None:
            raise ValueError(f"attention must come with a precision of the fast forms, got {attention!r} without one")
        fast = None
        if chosen_precision is not None:
            backend: Any = "reference" if where.type == "cpu" else "auto"
            fast = FastConfig(precision=chosen_precision, attention=attention, backend=backend, originals="drop")
        company = None if mesh is None else Company(mesh, shard_weights)
        # Ranks load a model together, so none may find on its host what another has no room for there.
        residency = Residency(where, on_host and mesh is None)
        return cls(Parts(layout, where, fast, decoder, residency, company), placement)

    @tells_faults
    def __call__(
        self,
        prompt: str | None = None,
        *,
        image: Any = None,
        audio: str | Path | None = None,
        negative_prompt: str | None = None,
        seconds: int = 5,
        resolution: str = "1080p",
        aspect: str = "16:9",
        stages: int = 2,
        first: Literal["distilled", "base"] = "distilled",
        seed: int = 42,
        noise: Literal["device", "cpu"] = "device",
        fps: int = FPS,
        callback: Callback | None = None,
        progress: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        latents: str | Path | None = None,
        resume: str | Path | None = None,
    ) -> Clip:
        """Make a clip. Everything that can be known to fail is checked first.

        Args:
            prompt: What to show and to sound; docs/PIPELINE.md says in which form. Left out with ``resume``.
            image: First picture: a file, a picture of Pillow's or an array [H, W, 3] uint8. Its middle is cut to the
                clip's aspect.
            audio: Sound file that the clip is made for and keeps; cut to ``seconds``.
            negative_prompt: What not to show, of the base model; by default this package's own words.
            seconds: Whole seconds, 3 to 15.
            resolution: ``"1080p"``, ``"540p"`` or, in one stage, ``"256p"``.
            aspect: ``"16:9"``, ``"9:16"`` or ``"1:1"``.
            stages: 2: a clip of 256p first, then the size asked for; 1: the size asked for at once.
            first: Model of the first stage: ``"distilled"`` (8 steps) or ``"base"`` (32 steps with guidance).
            seed: Of all noise: the same gives the same clip on the same machine.
            noise: Where it is drawn: ``"device"``, in the public implementation's order; or ``"cpu"``, alike
                everywhere.
            fps: 25, what the public weights mean.
            callback: Called with a :class:`StageInfo` after every step of every stage; what it raises ends the run.
            progress: Whether to show a bar on standard error.
            out: mp4 file that frames go to while the next are decoded; the clip then holds none.
            overwrite: Replace ``out``, and what ``latents`` names, where they are there.
            latents: Safetensors file that keeps the latents. Without one they are kept only where the run fails after
                its first stage: beside ``out``, or in a temporary folder; a warning names the file.
            resume: Such a file, to go on from; settings are its own, and the latents that follow go into it.

        Returns:
            The clip, with what each stage took.

        Raises:
            TypeError, ValueError: An argument is of a wrong type or not among the allowed values.
            FileNotFoundError: A part is missing; says where it is published.
            CheckpointError: A part's files are damaged, or of something else.
            ImportError: A library is missing, broken or of a wrong version.
            OSError: ``out`` cannot be written.
        """
        require_rate(fps)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable with a StageInfo, or None; got {type(callback).__name__}")
        settings: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "seconds": seconds,
            "resolution": resolution,
            "aspect": aspect,
            "stages": stages,
            "first": first,
            "seed": seed,
            "noise": noise,
            "image": image is not None,
            "sound": audio is not None,
        }
        begun = None if resume is None else read_latents(resume)
        request = Request(prompt=prompt or "", **settings) if begun is None else _resumed(begun, prompt, settings)
        target = None if out is None else Path(out)
        if target is not None:
            require_mp4(target)
            require_target(target, overwrite)
            optional.require("av", "writing an mp4")
            if not is_special(target):
                _require_room(real_path(target).parent, request)
        resumed = None if resume is None else Path(resume)
        kept = resumed if latents is None else Path(latents)
        if kept is not None:
            require_target(kept, overwrite or kept == resumed)
            if target is not None and real_path(kept) == real_path(target):
                raise ValueError(f"out must be another file than that of the latents, got {kept} for both")
        if begun is None:
            cache = PromptCache(self.parts.layout.find("text_encoder"))
            known = {prompt: cache.get(prompt) for prompt in request.prompts}
        else:
            known = {request.prompt: begun.text}
        self.parts.check(request, known, denoise=begun is None or not begun.whole)
        placing = place(self.parts, request, self.placement)
        run = Run(request, self.parts, placing, callback=callback, shown=progress, begun=begun)
        pictures = _pictures(image, request) if image is not None else None
        sound = read_sound(audio, request.seconds) if audio is not None else None
        with ExitStack() as stack:
            stack.enter_context(run.monitor.display())
            stack.callback(self.parts.residency.free)
            keeper = stack.enter_context(Keeper(kept, target))
            return run.decoded(run.denoised(known, pictures, sound, keeper), target)

    @tells_faults
    def follow(self) -> None:
        """Take part in one clip that rank 0 makes by a call: in the stages that denoise, with its settings.

        Raises:
            ValueError: There are no other ranks, this is rank 0, or ranks differ; names in what.
            RankError: Rank 0 failed, or said nothing for 600 s; names it.
            FileNotFoundError, CheckpointError: A model is missing here, or damaged.
        """
        parts = self.parts
        if parts.company is None or parts.company.meeting.rank == 0:
            raise ValueError("follow is for ranks 1 and above of a pipeline with mesh=...; rank 0 calls the pipeline")
        while (work := parts.company.hear()) is not None:
            run = Run(work.request, parts, work.placing)
            run.generator.set_state(work.noise)
            getattr(run, work.stage)(*work.given)
        parts.residency.free()

    def preview(self) -> Preview:
        """The map that makes small pictures of the latents that a callback gets, fitted to the video decoder.

        Raises:
            FileNotFoundError, CheckpointError: The decoder is missing or damaged.
        """
        with self.parts.using("video_decoder") as decoder:
            return fit_preview(decoder, self.parts.device)

    @property
    def layout(self) -> Layout:
        """Where the parts lie."""
        return self.parts.layout


def _pictures(image: Any, request: Request) -> list[torch.Tensor]:
    """The first picture at the size of each stage, [1, 3, 1, H, W] float32 in -1..1."""
    opened = open_image(image)
    sizes = dict.fromkeys(tokens.pixels for tokens in (request.first_tokens, request.last_tokens))
    return [image_pixels(opened, height, width) for height, width in sizes]


def _require_room(folder: Path, request: Request) -> None:
    """Raise where a disk certainly has too little room: latents of both stages, and a film of 0.4 bits a pixel."""
    tokens = request.last_tokens
    height, width = tokens.pixels
    needed = 8 * LATENT_CHANNELS * tokens.T * tokens.H * tokens.W + request.frames * height * width // 20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output must have room for {needed / 1e6:.1f} MB of latents and film, {folder} has {free / 1e6:.1f} MB"
        )


def _precision_on(device: torch.device, layout: Layout) -> Precision | None:
    """Precision for a device; None on a CPU, where the fast forms only imitate kernels."""
    arch = compute_capability(device)
    if arch is None:
        return None
    for name, part in PARTS.items():
        if part.preset and layout.there(name) and is_packed(layout.find(name)):
            return packed_config(layout.find(name), None)[1].precision
    return "fp8" if arch >= 100 else "int8" if arch >= 80 else "bf16"


def _resumed(begun: Latents, prompt: str | None, settings: dict[str, Any]) -> Request:
    """The settings of a run that is gone on with; others may be given only where they are the same."""
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    for name in ("image", "audio"):
        if settings["sound" if name == "audio" else name]:
            raise ValueError(f"{name} must be left out with resume: its latent is in the file")
    for name, value in {"prompt": prompt, **settings}.items():
        unset = value is None if name == "prompt" else value == defaults[name]
        before = getattr(begun.request, name)
        if not unset and value != before:
            raise ValueError(f"{name} must be left out with resume, whose file has {before!r}; got {value!r}")
    return begun.request
