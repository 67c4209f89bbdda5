"""``happyhorse-fast sample``: read a checkpoint and a file of inputs, write a file of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import happyhorse_fast
from happyhorse_fast._version import __version__
from happyhorse_fast.cli.options import (
    AttentionOption,
    ConfigOption,
    DeviceOption,
    PresetOption,
    ShardOption,
    read_config,
    shards,
    usable_device,
)
from happyhorse_fast.cli.output import JsonOption, emit, gib, literal, save_tensors
from happyhorse_fast.cli.sample_inputs import Inputs, read_inputs
from happyhorse_fast.fast.config import FastConfig, Precision
from happyhorse_fast.files import is_special, require_target
from happyhorse_fast.parallel.launched import Launched
from happyhorse_fast.tokens import VAE_STRIDE, fps_of, tokens_for

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from happyhorse_fast.sampler import StepInfo
    from happyhorse_fast.sampler.steps import Denoiser

Dtype = Literal["bfloat16", "float32", "float64"]


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
    fps: Annotated[
        int | None, typer.Option(help="With --resolution: 24 or 25; by default what the preset's weights mean.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Compute dtype; bfloat16 as published, and alone with --fast.")
    ] = "bfloat16",
    fast: Annotated[
        Precision | None,
        typer.Option(help="Run this package's kernels instead of eager torch: bf16, exact; int8; or fp8. Both stages."),
    ] = None,
    attention: AttentionOption = None,
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
    shard_weights: ShardOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample a clip's latents; with --sr-checkpoint in two stages. Under torchrun every process shares each clip."""
    from happyhorse_fast import golden

    process = Launched.here()
    require_target(output, force)
    if output.exists() and inputs.exists() and output.samefile(inputs) and not is_special(output):
        raise ValueError(f"output must not be the file of inputs, got {output} for both")
    second = sr_checkpoint is not None
    if second != (size is not None) or (not second and (sr_preset is not None or sr_config is not None)):
        raise ValueError("--sr-checkpoint and --size must come together, with --sr-preset or --sr-config")
    if fast is not None and dtype != "bfloat16":
        raise ValueError(
            f"--dtype must be left out or bfloat16 with --fast, got {dtype}: their products are in it or 8 bits"
        )
    if attention is not None and fast is None:
        raise ValueError(f"--attention must come with --fast, got {attention} without it")
    how_fast = None if fast is None else (fast, attention)
    tensors = read_inputs(inputs)
    where = process.device(usable_device(device))
    first = _Stage(checkpoint, preset, config, dtype, how_fast)
    fps = fps_of(preset) if fps is None else fps
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
        "device": where,
    }
    record = Record()
    draw = tensors.replay if tensors.noise else partial(golden.draw, seed)
    start = _start(first, tensors, draw, resolution, (aspect, seconds, fps))
    how = {"steps": steps, "shift": shift, "guidance": guidance, "noise": draw}
    conditions = _conditions(tensors, image_key)
    stage: _Stage | None = None
    sr_how: dict[str, Any] = {"size": size, "steps": sr_steps, "shift": shift, "noise": draw}
    # What the samplers say of their arguments is known before minutes of loading.
    with contextlib.suppress(_CheckedError):
        _first_stage(_Unloaded(first), start, conditions, how)
    if sr_checkpoint is not None:
        stage = _Stage(sr_checkpoint, sr_preset, sr_config, dtype, how_fast, "sr-")
        with contextlib.suppress(_CheckedError):
            _second_stage(_Unloaded(stage), start, conditions, sr_how)
    for there in filter(None, (first, stage)):
        there.config.require_ranks(process.size)
    progress = not as_json and process.rank == 0
    with process.mesh(where) as mesh:
        shard = shards(mesh, shard_weights)

        def loaded(there: _Stage) -> Any:
            model = there.load(device=where, progress=progress, shard=shard)
            return model if mesh is None else happyhorse_fast.parallelize(model, mesh)

        # No name holds a model: the first is gone before the second is loaded.
        latents = _first_stage(loaded(first), start, conditions, how, callback=record, progress=progress)
        if stage is not None:
            again = Record()
            shown: dict[str, Any] = {"callback": again, "progress": progress}
            latents["video"] = _second_stage(loaded(stage), latents, conditions, sr_how, **shown)
    settings |= {"ranks": process.size, "steps": len(record.sigmas), "sigmas": [*record.sigmas, 0.0]}
    if stage is not None:
        settings |= {
            "sr_checkpoint": sr_checkpoint,
            "sr_preset": sr_preset,
            "sr_config": sr_config,
            "sr_steps": sr_steps,
            "size": size,
            "sr_sigmas": [*again.sigmas, 0.0],
        }
        record.seconds += again.seconds
        record.memory_bytes = max(record.memory_bytes or 0, again.memory_bytes or 0) or None
    rows, columns = latents["video"].shape[3:]
    if process.rank:  # rank 0 writes what all have
        return
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
    """Times and noise levels of a stage, kept by its callback.

    Attributes:
        sigmas: Noise level that each step started from.
        seconds: Time of each step.
        memory_bytes: Peak so far.
    """

    sigmas: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory_bytes: int | None = None

    def __call__(self, info: StepInfo) -> None:
        self.sigmas.append(info.sigma)
        self.seconds.append(info.seconds)
        self.memory_bytes = info.memory_bytes


class _Stage:
    """A checkpoint and how to run it.

    Args:
        checkpoint: Folder or file.
        preset: Of the model; a second stage needs it, or ``config``, unless its weights are packed.
        config: JSON file, in place of ``preset``.
        dtype: Compute dtype.
        fast: Precision of products and of attention; None for eager.
        option: First words of its options' names.
    """

    def __init__(
        self,
        checkpoint: Path,
        preset: str | None,
        config: Path | None,
        dtype: Dtype,
        fast: tuple[Precision, str | None] | None,
        option: str = "",
    ) -> None:
        import torch

        from happyhorse_fast.checkpoint.load import check_load, load
        from happyhorse_fast.checkpoint.packed import is_packed

        if option and not is_packed(checkpoint) and (preset is None) == (config is None):
            got = "neither" if preset is None else "both"
            raise ValueError(f"exactly one of --{option}preset and --{option}config is required, got {got}")
        how: dict[str, Any] = {
            "compute_dtype": getattr(torch, dtype),
            "fast": None if fast is None else FastConfig(precision=fast[0], attention=fast[1]),  # type: ignore[arg-type]  # checked there,
        }
        self.stream_dtype = torch.promote_types(how["compute_dtype"], torch.float32)
        # Raises what loading would, before data are read.
        self.config = check_load(checkpoint, preset, read_config(config), **how)
        self.load = partial(load, checkpoint, preset, read_config(config), **how)


def _start(
    stage: _Stage, tensors: Inputs, draw: Any, resolution: str | None, clip: tuple[str, int, int]
) -> dict[str, torch.Tensor]:
    """Video and audio to start from, on the CPU."""
    config, path = stage.config, tensors.path
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
    """A denoiser of a configuration alone."""

    def __init__(self, stage: _Stage) -> None:
        import torch

        self.config, self.stream_dtype, self.device = stage.config, stage.stream_dtype, torch.device("cpu")

    def __call__(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> Any:
        raise _CheckedError


def _first_stage(
    model: Denoiser,
    start: Mapping[str, torch.Tensor],
    conditions: Mapping[str, torch.Tensor | None],
    how: Mapping[str, Any],
    **shown: Any,
) -> dict[str, torch.Tensor]:
    from happyhorse_fast.sampler import sample as run

    there: dict[str, Any] = {**start, **conditions}
    there = {name: None if value is None else value.to(model.device) for name, value in there.items()}
    video, audio = run(model, **there, **how, **{"progress": False, **shown})
    return {"video": video, "audio": audio}


def _second_stage(
    model: Denoiser,
    latents: Mapping[str, torch.Tensor],
    conditions: Mapping[str, Any],
    how: Mapping[str, Any],
    **shown: Any,
) -> torch.Tensor:
    from happyhorse_fast.sampler import super_resolve

    text = conditions["text"].to(model.device)
    return super_resolve(model, latents["video"], latents["audio"], text, **how, **{"progress": False, **shown})


def _render(console: Console, data: Mapping[str, Any]) -> None:
    seconds = data["seconds_per_step"]
    peak = f", peak {gib(data['peak_memory_bytes'])}" if data["peak_memory_bytes"] is not None else ""
    console.print(literal((str(data["output"]), "bold"), f": video {data['video']}, audio {data['audio']}"))
    per_step = sum(seconds) / len(seconds)
    console.print(
        literal(
            f"{len(seconds)} step{'s'[: len(seconds) != 1]} in {sum(seconds):.2f} s, {per_step:.3f} s per step{peak}"
        )
    )
    if data["ignored"]:
        console.print(literal(f"not used of {data['settings']['inputs']}: {', '.join(data['ignored'])}"))
