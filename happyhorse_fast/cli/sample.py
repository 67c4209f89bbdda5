"""``happyhorse-fast sample``: a checkpoint and a file of inputs in, a file of latents out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from happyhorse_fast._version import __version__
from happyhorse_fast.cli.options import ConfigOption, DeviceOption, PresetOption, read_config, usable_device
from happyhorse_fast.cli.output import JsonOption, emit, gib, literal, save_tensors
from happyhorse_fast.cli.sample_inputs import Inputs, drawn, read_inputs
from happyhorse_fast.files import require_target
from happyhorse_fast.tokens import VAE_STRIDE, tokens_for

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from happyhorse_fast.config import ModelConfig
    from happyhorse_fast.sampler import StepInfo

Dtype = Literal["bfloat16", "float32", "float64"]
Fast = Literal["bf16", "int8", "fp8"]
Attention = Literal["bf16", "int8_qk", "fp8"]


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or file, as published.")],
    inputs: Annotated[
        Path,
        typer.Argument(
            help="Safetensors file: text; video and audio (the starting noise); image, null_text, noise.video.{i} and "
            "noise.audio.{i} where there are any. An in. before a name is allowed."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Safetensors file to write: video and audio latents.")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; 8, or 32 with --guidance.")] = None,
    shift: Annotated[float, typer.Option(help="Of the noise levels.")] = 5.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Of noise the inputs do not hold; drawn by name, alike on any device."),
    ] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance, for the base model; needs null_text in the inputs.")
    ] = None,
    image_key: Annotated[
        str | None,
        typer.Option(help="Name of the image latent [1, C, 1, H, W] in the inputs; image where there is one."),
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="1080p, 540p or 256p: makes the starting noise where the inputs hold none.")
    ] = None,
    aspect: Annotated[str, typer.Option(help="With --resolution: 16:9, 9:16 or 1:1.")] = "16:9",
    seconds: Annotated[int, typer.Option(help="With --resolution: 3 to 15.")] = 5,
    fps: Annotated[int, typer.Option(help="With --resolution: 24 or 25.")] = 24,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Compute dtype; bfloat16 as published, and alone with --fast.")
    ] = "bfloat16",
    fast: Annotated[
        Fast | None,
        typer.Option(help="Run this package's kernels instead of eager torch: bf16, exact; or fp8. Both stages."),
    ] = None,
    attention: Annotated[
        Attention | None,
        typer.Option(help="With --fast: precision of attention; left out, FastConfig's default. Both stages."),
    ] = None,
    sr_checkpoint: Annotated[Path | None, typer.Option(help="Second stage: its checkpoint.")] = None,
    sr_preset: Annotated[str | None, typer.Option(help="Second stage: its preset.")] = None,
    sr_config: Annotated[
        Path | None, typer.Option(help="Second stage: its configuration, in place of a preset.")
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Second stage: latent rows and columns to make, pixels / 16, both even and no fewer than the first "
            "stage's: 68 120 for 1080p at 16:9 (1088 x 1920 pixels), 32 56 for 540p (512 x 896)."
        ),
    ] = None,
    sr_steps: Annotated[int, typer.Option(help="Second stage: UniPC steps.")] = 5,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample a clip's latents; with --sr-checkpoint in two stages."""
    require_target(output, force)
    second = sr_checkpoint is not None
    if second != (size is not None) or (not second and (sr_preset is not None or sr_config is not None)):
        raise ValueError("--sr-checkpoint and --size must come together, with --sr-preset or --sr-config")
    if fast is not None and dtype != "bfloat16":
        raise ValueError(f"--dtype must be left out or bfloat16 with --fast, got {dtype}: fast layers are bf16 or fp8")
    if attention is not None and fast is None:
        raise ValueError(f"--attention must come with --fast, got {attention} without it")
    how_fast = None if fast is None else (fast, attention)
    tensors = read_inputs(inputs)
    first = _Stage(checkpoint, preset, config, usable_device(device), dtype, how_fast, not as_json)
    drawn_clip = (None,) * 4 if resolution is None else (resolution, aspect, seconds, fps)
    settings: dict[str, Any] = {
        "version": __version__,
        "checkpoint": checkpoint,
        "preset": preset,
        "config": config,
        "inputs": inputs,
        "seed": seed,
        # A clip from noise in the inputs has the length and rate that whoever made the noise meant.
        **dict(zip(("resolution", "aspect", "seconds", "fps"), drawn_clip, strict=True)),
        "noise": "recorded in the inputs" if tensors.noise else f"drawn by name from seed {seed}",
        "shift": shift,
        "guidance": guidance,
        "dtype": dtype,
        "fast": fast,
        "attention": attention,
        "device": first.device,
    }
    record = Record()
    draw = tensors.replay if tensors.noise else drawn(seed)
    start = _start(first, tensors, draw, resolution, (aspect, seconds, fps))
    how = {"steps": steps, "shift": shift, "guidance": guidance, "noise": draw}
    conditions = _conditions(tensors, image_key)
    stage: _Stage | None = None
    sr_how: dict[str, Any] = {"size": size, "steps": sr_steps, "shift": shift, "noise": draw}
    _check_first_stage(first, start, conditions, how)
    if sr_checkpoint is not None:
        stage = _Stage(sr_checkpoint, sr_preset, sr_config, first.device, dtype, how_fast, not as_json, option="sr-")
        _check_second_stage(stage, start, conditions, sr_how)
    latents = _first_stage(first, start, conditions, record, how)
    settings |= {"steps": len(record.sigmas), "sigmas": [*record.sigmas, 0.0]}
    if stage is not None:
        sr_record = Record()
        latents["video"] = _second_stage(stage, latents, conditions, sr_record, sr_how)
        settings |= {
            "sr_checkpoint": sr_checkpoint,
            "sr_preset": sr_preset,
            "sr_config": sr_config,
            "sr_steps": sr_steps,
            "size": size,
            "sr_sigmas": [*sr_record.sigmas, 0.0],
        }
        record.seconds += sr_record.seconds
        record.memory_bytes = max(record.memory_bytes or 0, sr_record.memory_bytes or 0) or None
    rows, columns = latents["video"].shape[3:]
    settings["pixels"] = [rows * VAE_STRIDE[1], columns * VAE_STRIDE[2]]
    save_tensors(output, latents, settings)
    data = {
        "output": output,
        "video": list(latents["video"].shape),
        "audio": list(latents["audio"].shape),
        "seconds_per_step": record.seconds,
        "peak_memory_bytes": record.memory_bytes,
        "ignored": sorted(tensors.ignored),
        "settings": settings,
    }
    emit(data, as_json, lambda console: _render(console, data))


@dataclass
class Record:
    """What a stage's callback kept.

    Attributes:
        sigmas: Noise level that each step started from.
        seconds: Time of each step.
        memory_bytes: Peak so far.
    """

    sigmas: list[float]
    seconds: list[float]
    memory_bytes: int | None

    def __init__(self) -> None:
        self.sigmas, self.seconds, self.memory_bytes = [], [], None

    def __call__(self, info: StepInfo) -> None:
        self.sigmas.append(info.sigma)
        self.seconds.append(info.seconds)
        self.memory_bytes = info.memory_bytes


@dataclass(frozen=True)
class _Stage:
    """A checkpoint and how to run it.

    Attributes:
        fast: Precision of products and of attention; None for eager.
        option: What its options' names start with.
    """

    checkpoint: Path
    preset: str | None
    config: Path | None
    device: str
    dtype: Dtype
    fast: tuple[Fast, Attention | None] | None
    progress: bool
    option: str = ""

    def check(self) -> ModelConfig:
        """The model's configuration; raises what :meth:`load` would before it reads data."""
        from happyhorse_fast.model.checkpoint import check_load
        from happyhorse_fast.model.packed_checkpoint import is_packed

        if self.option and not is_packed(self.checkpoint) and (self.preset is None) == (self.config is None):
            got = "neither" if self.preset is None else "both"
            raise ValueError(f"exactly one of --{self.option}preset and --{self.option}config is required, got {got}")
        read = read_config(self.config)
        return check_load(self.checkpoint, self.preset, read, compute_dtype=self._dtype(), fast=self._fast())

    def load(self) -> Any:
        from happyhorse_fast.model.checkpoint import load

        return load(
            self.checkpoint,
            self.preset,
            read_config(self.config),
            device=self.device,
            compute_dtype=self._dtype(),
            progress=self.progress,
            fast=self._fast(),
        )

    def _dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype)

    def _fast(self) -> Any:
        from happyhorse_fast.model.fast_config import FastConfig

        return None if self.fast is None else FastConfig(precision=self.fast[0], attention=self.fast[1])


def _start(
    stage: _Stage, tensors: Inputs, draw: Any, resolution: str | None, clip: tuple[str, int, int]
) -> dict[str, torch.Tensor]:
    """Video and audio to start from, on the CPU."""
    config, path = stage.check(), tensors.path
    given = {name: tensors.take(name) for name in ("video", "audio")}
    here = {name: value for name, value in given.items() if value is not None}
    if len(here) == len(given):
        if resolution is not None:
            raise ValueError(f"--resolution makes the starting noise, but {path} holds video and audio")
        return here
    if here:
        raise ValueError(f"{path}: must hold both video and audio or neither, got only {', '.join(here)}")
    if resolution is None:
        raise ValueError(f"{path}: must hold video and audio to start from, or --resolution must be given to draw them")
    size = tokens_for(resolution, *clip)
    return {
        "video": draw("in.video", (1, config.latent_channels, size.T, size.H, size.W)),
        "audio": draw("in.audio", (1, size.audio, config.audio_in_channels)),
    }


def _conditions(tensors: Inputs, image_key: str | None) -> dict[str, torch.Tensor | None]:
    """text, image and null_text, on the CPU."""
    text, null_text = tensors.take("text"), tensors.take("null_text")
    there = ", ".join(sorted(tensors.named))
    if text is None:
        raise ValueError(f"{tensors.path}: must hold text (or in.text) [1, L, Ct], got {there}")
    image = tensors.take(image_key or "image")
    if image_key is not None and image is None:
        raise ValueError(f"{tensors.path}: --image-key names {image_key}, got {there}")
    return {"text": text, "image": image, "null_text": null_text}


class _CheckedError(Exception):
    """A sampler has checked its arguments and asks for the first velocity."""


class _Unloaded:
    """A denoiser of a configuration alone: what a sampler says of its arguments is known before minutes of loading."""

    def __init__(self, stage: _Stage) -> None:
        import torch

        self.config, self.device = stage.check(), torch.device("cpu")
        self.stream_dtype = torch.promote_types(getattr(torch, stage.dtype), torch.float32)

    def __call__(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> Any:
        raise _CheckedError


def _check_first_stage(
    stage: _Stage, start: Mapping[str, Any], conditions: Mapping[str, Any], how: Mapping[str, Any]
) -> None:
    from happyhorse_fast.sampler import sample as run

    with contextlib.suppress(_CheckedError):
        run(_Unloaded(stage), start["video"], start["audio"], progress=False, **conditions, **how)


def _check_second_stage(
    stage: _Stage, start: Mapping[str, Any], conditions: Mapping[str, Any], how: Mapping[str, Any]
) -> None:
    from happyhorse_fast.sampler import super_resolve

    with contextlib.suppress(_CheckedError):
        super_resolve(_Unloaded(stage), start["video"], start["audio"], conditions["text"], progress=False, **how)


def _first_stage(
    stage: _Stage,
    start: Mapping[str, torch.Tensor],
    conditions: Mapping[str, torch.Tensor | None],
    record: Record,
    how: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    from happyhorse_fast.sampler import sample as run

    model = stage.load()
    there: dict[str, Any] = {
        n: None if value is None else value.to(model.device) for n, value in {**start, **conditions}.items()
    }
    video, audio = run(model, **there, **how, callback=record, progress=stage.progress)
    return {"video": video, "audio": audio}


def _second_stage(
    stage: _Stage,
    latents: Mapping[str, torch.Tensor],
    conditions: Mapping[str, Any],
    record: Record,
    how: Mapping[str, Any],
) -> torch.Tensor:
    from happyhorse_fast.sampler import super_resolve

    model = stage.load()
    text = conditions["text"].to(model.device)
    return super_resolve(
        model, latents["video"], latents["audio"], text, **how, callback=record, progress=stage.progress
    )


def _render(console: Console, data: Mapping[str, Any]) -> None:
    seconds = data["seconds_per_step"]
    peak = f", peak {gib(data['peak_memory_bytes'])}" if data["peak_memory_bytes"] is not None else ""
    console.print(literal((str(data["output"]), "bold"), f": video {data['video']}, audio {data['audio']}"))
    per_step = sum(seconds) / len(seconds)
    console.print(literal(f"{len(seconds)} steps in {sum(seconds):.2f} s, {per_step:.3f} s per step{peak}"))
    if data["ignored"]:
        console.print(literal(f"not used of {data['settings']['inputs']}: {', '.join(data['ignored'])}"))
