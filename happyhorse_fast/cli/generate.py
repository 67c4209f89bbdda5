"""``happyhorse-fast generate``: a prompt becomes an mp4, over a folder of the published parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import happyhorse_fast as hh
from happyhorse_fast import optional
from happyhorse_fast.arguments import require_choice
from happyhorse_fast.cli.options import AttentionOption, DeviceOption, ShardOption, shards, usable_device
from happyhorse_fast.cli.output import JsonOption, Shown, emit, gib, literal, table
from happyhorse_fast.files import require_folder
from happyhorse_fast.parallel.launched import Launched

if TYPE_CHECKING:
    from happyhorse_fast.pipeline.preview import Preview
    from happyhorse_fast.pipeline.progress import StageInfo

PRECISIONS = ("auto", "fp8", "int8", "bf16", "eager")
HOW_TO_GET = (
    "--model must name a folder with the published parts (docs/PIPELINE.md lists them: GAIR/daVinci-MagiHuman and "
    "three more; nothing is downloaded). Without them: `python examples/tiny_checkpoint.py DIR` writes a tiny random "
    "checkpoint that `happyhorse-fast generate --model DIR` takes, and `happyhorse-fast demo` makes a clip with the "
    "small trained model of this package"
)
DEFAULT_PROMPT = (
    "A lighthouse on a cliff at dusk, waves breaking below, its beam turning slowly through the haze. "
    "Background Sound: <waves, distant gulls, wind>"
)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to show and to sound; left out: a short default, or --resume's.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the published parts, or of a tiny checkpoint. Required.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to video: the first picture.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound that the clip is made for and keeps.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show; with --first base.")] = None,
    out: Annotated[Path, typer.Option(help="The mp4 to write.")] = Path("happyhorse.mp4"),
    seconds: Annotated[int | None, typer.Option(help="Length, 3 to 15; 5 by default.")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="1080p, 540p or, with --stages 1, 256p; 1080p by default.")
    ] = None,
    aspect: Annotated[str | None, typer.Option(help="16:9, 9:16 or 1:1; 16:9 by default.")] = None,
    stages: Annotated[
        int | None, typer.Option(help="2: small first, then the size asked for; 1: at once. 2 by default.")
    ] = None,
    first: Annotated[str, typer.Option(help="First stage: distilled (8 steps) or base (32 with guidance).")] = (
        "distilled"
    ),
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 42,
    noise: Annotated[str, typer.Option(help="Where it is drawn: device, as published; or cpu, alike anywhere.")] = (
        "device"
    ),
    fps: Annotated[int, typer.Option(help="25: what the public weights mean.")] = 25,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "auto",
    attention: AttentionOption = None,
    decoder: Annotated[str, typer.Option(help="Of the video: turbo, or wan with four times the work.")] = "turbo",
    placement: Annotated[
        str, typer.Option(help="auto, resident (all parts stay on the device) or sequential (one at a time).")
    ] = "auto",
    device: DeviceOption = "auto",
    text_folder: Annotated[Path | None, typer.Option(help="Text encoder, where it lies elsewhere.")] = None,
    video_folder: Annotated[Path | None, typer.Option(help="Video autoencoder, likewise.")] = None,
    audio_folder: Annotated[Path | None, typer.Option(help="Audio autoencoder, likewise.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Keep the latents in this safetensors file.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from latents that a run left; its settings are used.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Folder for a picture of the latents after each step.")] = None,
    shard_weights: ShardOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the mp4.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a clip with sound from a prompt: text encoder, two denoising stages, decoders, mp4.

    Under torchrun all processes share the denoising.
    """
    if model is None:
        raise ValueError(HOW_TO_GET)
    require_choice("--precision", precision, PRECISIONS)
    if preview is not None:
        require_folder(preview)
        optional.require("PIL", "--preview")
    process = Launched.here()
    where = process.device(usable_device(device))
    with process.mesh(where) as mesh:
        pipe = hh.Pipeline.from_pretrained(
            model,
            precision=None if precision == "eager" else precision,  # type: ignore[arg-type]  # checked above
            attention=attention,  # type: ignore[arg-type]  # checked there, as what follows
            device=where,
            text_folder=text_folder,
            video_folder=video_folder,
            audio_folder=audio_folder,
            decoder=decoder,  # type: ignore[arg-type]
            placement=placement,  # type: ignore[arg-type]
            on_host=False,
            mesh=mesh,
            shard_weights=shards(mesh, shard_weights) is not None,
        )
        if process.rank:  # rank 0 reads and writes
            pipe.follow()
            return
        asked = {"seconds": seconds, "resolution": resolution, "aspect": aspect, "stages": stages}
        sizes: dict[str, Any] = {} if resume is not None else dict(pipe.layout.defaults)
        sizes |= {name: value for name, value in asked.items() if value is not None}
        clip = pipe(
            DEFAULT_PROMPT if prompt is None and resume is None else prompt,
            image=image,
            audio=audio,
            negative_prompt=negative_prompt,
            **sizes,
            first=first,  # type: ignore[arg-type]
            seed=seed,
            noise=noise,  # type: ignore[arg-type]
            fps=fps,
            callback=None if preview is None else _previews(preview, pipe.preview()),
            progress=not as_json,
            out=out,
            overwrite=force,
            latents=latents,
            resume=resume,
        )
    height, width = clip.request.last_tokens.pixels
    data = {
        "output": out,
        "frames": clip.request.frames,
        "size": [width, height],
        "fps": clip.fps,
        "samples": clip.samples.shape[1],
        "sample_rate": clip.sample_rate,
        "placement": clip.placing.placement,
        "kept": clip.placing.kept,
        "planned_peak_bytes": None if clip.placing.budget_bytes is None else clip.placing.peak_bytes,
        "device": str(pipe.parts.device),
        "ranks": process.size,
        "precision": "eager" if pipe.parts.fast is None else pipe.parts.fast.precision,
        "settings": clip.request.to_dict(),
        "stages": list(clip.stages),
        "seconds": clip.seconds,
        "peak_bytes": clip.peak_bytes,
        "latents": latents if resume is None else latents or resume,
    }
    emit(data, as_json, _shown(data))


def _previews(folder: Path, shots: Preview) -> Callable[[StageInfo], None]:
    """A callback that writes a picture of each step that denoises."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(info: StageInfo) -> None:
        if info.video is not None:
            shots.save(folder / f"{info.stage}-{info.step:02}.png", info.video)

    return write


def _shown(data: dict[str, Any]) -> Shown:
    width, height = data["size"]
    yield literal(
        (str(data["output"]), "bold"),
        f": {data['frames']} frames of {width} x {height} at {data['fps']} a second, sound at "
        f"{data['sample_rate']:,} Hz",
    )
    rows = [
        [cost.stage, f"{cost.seconds:.1f}", f"{cost.load_seconds:.1f}", gib(cost.peak_bytes) if cost.peak_bytes else ""]
        for cost in data["stages"]
    ]
    what = "peak on the device" if data["device"].startswith("cuda") else "process's peak so far"
    title = f"{data['seconds']:.1f} s on {data['device']}, parts {data['placement']}"
    yield table(title, ["stage", "seconds", "of it loading", what], rows)
    if data["latents"] is not None:
        yield f"latents: {data['latents']}"
