"""``happyhorse-fast sample``: read a checkpoint and a file of inputs, write a file of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
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
    given,
    read_config,
    shards,
    usable_device,
)
from happyhorse_fast.cli.output import JsonOption, Shown, emit, gib, literal, save_tensors
from happyhorse_fast.fast.config import FastConfig, Precision
from happyhorse_fast.files import is_special, require_target
from happyhorse_fast.parallel.launched import Launched
from happyhorse_fast.tokens import VAE_STRIDE, ClipTokens, fps_of, tokens_for

if TYPE_CHECKING:
    import torch

    from happyhorse_fast.config import ModelConfig
    from happyhorse_fast.sampler import StepInfo
    from happyhorse_fast.sampler.steps import Denoiser

Dtype = Literal["bfloat16", "float32", "float64"]
RECORDED = (
    "checkpoint", "preset", "config", "inputs", "seed", "resolution", "shift", "guidance", "dtype", "fast", "attention"
)  # fmt: skip
SECOND = ("sr_checkpoint", "sr_preset", "sr_config", "sr_steps", "size")
"""Options that are written beside the latents as they are."""
CLIP = ("aspect", "seconds", "fps")
"""Options of the starting noise that --resolution makes."""


def sample(
    context: typer.Context,
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
    from happyhorse_fast import golden, sampler
    from happyhorse_fast.checkpoint.packed import is_packed

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
    if sr_checkpoint is not None and not is_packed(sr_checkpoint) and (sr_preset is None) == (sr_config is None):
        got = "neither" if sr_preset is None else "both"
        raise ValueError(f"exactly one of --sr-preset and --sr-config is required, got {got}")
    alone = given(context, CLIP)
    if alone and resolution is None:
        raise ValueError(f"{' and '.join(alone)} must come with --resolution: noise in the inputs has its own size")
    how_fast = None if fast is None else FastConfig(precision=fast, attention=attention)  # type: ignore[arg-type]
    named, recorded = _read_inputs(inputs)
    where = process.device(usable_device(device))
    first = _Stage(checkpoint, preset, config, dtype, how_fast)
    fps = fps_of(preset) if fps is None else fps
    draw = partial(_replay, inputs, recorded) if recorded else partial(golden.draw, seed)
    clip = None if resolution is None else partial(tokens_for, resolution, aspect, seconds, fps)
    start = _start(first.config, inputs, named, draw, clip)
    conditions = _conditions(inputs, named, image_key)

    def denoise(model: Denoiser, **how: Any) -> dict[str, torch.Tensor]:
        there = {name: None if x is None else x.to(model.device) for name, x in (start | conditions).items()}
        how |= {"steps": steps, "shift": shift, "guidance": guidance, "noise": draw}
        return dict(zip(("video", "audio"), sampler.sample(model, **there, **how), strict=True))  # type: ignore[arg-type]

    def enlarge(model: Denoiser, latents: Mapping[str, torch.Tensor], **how: Any) -> torch.Tensor:
        there = {"video": latents["video"], "audio": latents["audio"], "text": conditions["text"].to(model.device)}
        how |= {"size": size, "steps": sr_steps, "shift": shift, "noise": draw}
        return sampler.super_resolve(model, **there, **how)

    # What the samplers say of their arguments is known before minutes of loading.
    with contextlib.suppress(_CheckedError):
        denoise(first, progress=False)
    stages = [first]
    if sr_checkpoint is not None:
        stages.append(_Stage(sr_checkpoint, sr_preset, sr_config, dtype, how_fast))
        with contextlib.suppress(_CheckedError):
            enlarge(stages[1], start, progress=False)
    for stage in stages:
        stage.config.require_ranks(process.size)
    progress = not as_json and process.rank == 0
    with process.mesh(where) as mesh:
        shard = shards(mesh, shard_weights)

        def loaded(stage: _Stage) -> Any:
            model = stage.load(device=where, progress=progress, shard=shard)
            return model if mesh is None else happyhorse_fast.parallelize(model, mesh)

        # No name holds a model: the first is gone before the second is loaded.
        latents = denoise(loaded(first), callback=first.note, progress=progress)
        for stage in stages[1:]:
            latents["video"] = enlarge(loaded(stage), latents, callback=stage.note, progress=progress)
    if process.rank:  # rank 0 writes what all have
        return
    rows, columns = latents["video"].shape[3:]
    sigmas = [[*(step.sigma for step in stage.taken), 0.0] for stage in stages]
    drawn_clip = {"aspect": aspect, "seconds": seconds, "fps": fps}
    settings = {name: context.params[name] for name in (*RECORDED, *(SECOND if second else ()))} | {
        "version": __version__,
        # A clip from noise in the inputs has the length and rate that whoever made the noise meant.
        **(dict.fromkeys(drawn_clip) if resolution is None else drawn_clip),
        "noise": "recorded in the inputs" if recorded else f"drawn by name from seed {seed}",
        "device": where,
        "ranks": process.size,
        "steps": len(first.taken),
        "sigmas": sigmas[0],
        "pixels": [rows * VAE_STRIDE[1], columns * VAE_STRIDE[2]],
        **({"sr_sigmas": sigmas[1]} if second else {}),
    }
    save_tensors(output, latents, settings)
    every = [step for stage in stages for step in stage.taken]
    used = {"video", "audio", "text", "null_text", image_key or "image"}
    data = {
        "output": output,
        "video": list(latents["video"].shape),
        "audio": list(latents["audio"].shape),
        "seconds_per_step": [step.seconds for step in every],
        "peak_memory_bytes": max((step.memory_bytes or 0 for step in every), default=0) or None,
        "ignored": sorted(named.keys() - used),
        "settings": settings,
    }
    emit(data, as_json, _shown(data))


class _CheckedError(Exception):
    """A sampler has checked its arguments and asks for the first velocity."""


class _Stage:
    """A checkpoint that is not loaded yet: a denoiser of its configuration, which ends a run at its first velocity.

    Attributes:
        taken: The steps that its model took, without latents, which would stay in memory.
    """

    def __init__(
        self, checkpoint: Path, preset: str | None, config: Path | None, dtype: Dtype, fast: FastConfig | None
    ) -> None:
        import torch

        from happyhorse_fast.checkpoint.load import check_load, load

        given = (checkpoint, preset, read_config(config))
        how: dict[str, Any] = {"compute_dtype": getattr(torch, dtype), "fast": fast}
        self.config = check_load(*given, **how)  # raises what loading would, before data are read
        self.load = partial(load, *given, **how)
        self.stream_dtype = torch.promote_types(how["compute_dtype"], torch.float32)
        self.device = torch.device("cpu")
        self.taken: list[StepInfo] = []

    def note(self, info: StepInfo) -> None:
        """Keep a step, as a sampler's ``callback``."""
        self.taken.append(replace(info, video=None, audio=None))  # type: ignore[arg-type]

    def __call__(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> Any:
        raise _CheckedError


def _read_inputs(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read an inputs file, or a FIFO to its end; ``in.video`` and ``video`` mean the same.

    Returns:
        (all tensors but recorded noise, by names without ``in.``; the recorded noise).

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a safetensors file, or a name is there twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"inputs must be a safetensors file, there is none at {path}")
    try:
        tensors = load_file(path) if path.is_file() else load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"inputs must be a safetensors file, {path} is none: {error}") from error
    noise = {name: value for name, value in tensors.items() if name.startswith("noise.")}
    named: dict[str, torch.Tensor] = {}
    for key in tensors.keys() - noise.keys():
        name = key.removeprefix("in.")
        if name in named:
            raise ValueError(f"{path}: holds both {name} and in.{name}; one is allowed")
        named[name] = tensors[key]
    return named, noise


def _replay(path: Path, noise: Mapping[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    if name not in noise:
        raise ValueError(f"{path}: holds recorded noise ({', '.join(sorted(noise))}), but no {name}")
    return noise[name]


def _start(
    config: ModelConfig, path: Path, named: Mapping[str, torch.Tensor], draw: Any, clip: Callable[[], ClipTokens] | None
) -> dict[str, torch.Tensor]:
    """Video and audio to start from, on the CPU; drawn for ``clip()`` where that is given."""
    there = {name: named[name] for name in ("video", "audio") if name in named}
    if len(there) == 2:
        if clip is not None:
            raise ValueError(f"--resolution makes the starting noise, but {path} holds video and audio")
        return there
    if there:
        raise ValueError(f"{path}: must hold both video and audio or neither, got only {', '.join(there)}")
    if clip is None:
        raise ValueError(f"{path}: must hold video and audio to start from, or --resolution must be given to draw them")
    shapes = clip().shapes(config)
    return {name: draw(f"in.{name}", shapes[name]) for name in ("video", "audio")}


def _conditions(path: Path, named: Mapping[str, torch.Tensor], image_key: str | None) -> dict[str, Any]:
    """text, image and null_text, on the CPU; None where there is none."""
    there = ", ".join(sorted(named))
    if "text" not in named:
        raise ValueError(f"{path}: must hold text (or in.text) [1, L, Ct], got {there}")
    if image_key is not None and image_key not in named:
        raise ValueError(f"{path}: --image-key names {image_key}, got {there}")
    return {"text": named["text"], "image": named.get(image_key or "image"), "null_text": named.get("null_text")}


def _shown(data: Mapping[str, Any]) -> Shown:
    seconds = data["seconds_per_step"]
    peak = f", peak {gib(data['peak_memory_bytes'])}" if data["peak_memory_bytes"] is not None else ""
    yield literal((str(data["output"]), "bold"), f": video {data['video']}, audio {data['audio']}")
    per_step = sum(seconds) / len(seconds)
    yield f"{len(seconds)} step{'s'[: len(seconds) != 1]} in {sum(seconds):.2f} s, {per_step:.3f} s per step{peak}"
    if data["ignored"]:
        yield f"not used of {data['settings']['inputs']}: {', '.join(data['ignored'])}"
