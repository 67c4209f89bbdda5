"""From a prompt to an mp4 with tiny random parts: every stage, on a CPU, in frames of a few latents."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pydoc
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from logged import logs
from PIL import Image
from safetensors.torch import load_file
from sound_files import write_sine

from happyhorse_fast import tokens
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.cli import run
from happyhorse_fast.pipeline import residency
from happyhorse_fast.pipeline.clip import Clip
from happyhorse_fast.pipeline.image import image_pixels
from happyhorse_fast.pipeline.latents import Latents, read_latents
from happyhorse_fast.pipeline.pipeline import Pipeline
from happyhorse_fast.pipeline.placing import place
from happyhorse_fast.pipeline.progress import StageInfo
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.pipeline.run import Run
from happyhorse_fast.pipeline.text import TextEncoder
from happyhorse_fast.pipeline.turbo import to_uint8
from happyhorse_fast.pipeline.wan import WanCodec
from happyhorse_fast.sampler import sample, super_resolve

PROMPT = "a red ball bounces"
SIDES = {"256p": (64, 96), "540p": (96, 160), "1080p": (128, 192)}
SHORT: dict[str, Any] = {"seconds": 3, "resolution": "540p", "progress": False}
SMALL = SHORT | {"resolution": "256p", "stages": 1}
FRAMES, SAMPLES = 73, int(76 * 2048 * 441 / 512)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def connect(self: socket.socket, address: object) -> None:
        pytest.fail(f"a part calls {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(tokens, "SIDES", SIDES)
    monkeypatch.setenv("HAPPYHORSE_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny, precision=None, placement="resident", device="cpu")


@pytest.fixture(scope="module")
def whole(pipe: Pipeline) -> Clip:
    """What an undisturbed run makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SIDES", SIDES)
        return pipe(PROMPT, **SHORT)


@pytest.fixture(scope="module")
def broken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the model, changed."""

    def made(change: Callable[[Path], object]) -> Path:
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(tiny, folder)
        change(folder)
        return folder

    return made


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sine(tmp_path / "sound.wav", 48000)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base model, which takes 32 with two evaluations each."""
    monkeypatch.setattr(importlib.import_module("happyhorse_fast.sampler.sample"), "GUIDED_STEPS", 3)


def film(path: Path) -> tuple[str, str, int, int]:
    """(video codec, audio codec, frames, samples) of a file."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        frames = len(list(container.decode(video)))
        assert video.average_rate == 25 and audio.rate == 44100
        names = video.codec_context.name, audio.codec_context.name
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    return *names, frames, samples


def run_of(pipe: Pipeline, request: Request, begun: Latents | None = None) -> Run:
    return Run(request, pipe.parts, place(pipe.parts, request, pipe.placement), begun=begun)


def test_a_prompt_becomes_an_mp4_and_a_resumed_run_the_same(
    tiny: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, latents, shots = tmp_path / "x.mp4", tmp_path / "x.safetensors", tmp_path / "shots"
    sizes = ["--seconds", "3", "--resolution", "540p", "--device", "cpu"]
    files = ["--image", picture, "--out", out, "--latents", latents, "--preview", shots]
    assert run(["generate", PROMPT, "--model", str(tiny), *sizes, *map(str, files), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    kinds = film(out)
    assert kinds[:3] == ("h264", "aac", FRAMES)
    assert 0 <= kinds[3] - SAMPLES < 2048, "aac fills its last frame of 1,024"
    assert (data["frames"], data["samples"], data["size"]) == (FRAMES, SAMPLES, [160, 96])
    names = ["text", "image", "denoise", "super-resolve", "decode audio", "decode video"]
    assert [stage["stage"] for stage in data["stages"]] == names
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in data["stages"])
    assert len(list(shots.glob("denoise-*.png"))) == 8 and len(list(shots.glob("super-resolve-*.png"))) == 5
    assert Image.open(shots / "super-resolve-05.png").size == (40, 24)
    kept = load_file(latents)
    assert kept["video"].shape == (1, 48, 19, 6, 10) and kept["audio"].shape == (1, 76, 64)
    codec = WanCodec.load(tiny / "Wan2.2-TI2V-5B-Diffusers" / "vae", decoder=False)
    assert torch.equal(kept["video"][:, :, :1], codec.encode(image_pixels(picture, 96, 160))), "the first frame is held"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("x")) == [out.name, latents.name]

    again = tmp_path / "again.mp4"
    arguments = ["--resume", str(latents), "--out", str(again), "--model", str(tiny), "--device", "cpu"]
    assert run(["generate", *arguments]) == 0
    assert "decode video" in capsys.readouterr().out
    assert again.read_bytes() == out.read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipe(PROMPT, **SMALL, seed=1)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("the embedding is in the cache"))
    second, other = (pipe(PROMPT, **SMALL, seed=seed) for seed in (1, 2))
    assert first.frames is not None and first.frames.shape == (FRAMES, 64, 96, 3)
    assert first.samples.shape == (2, SAMPLES)
    assert torch.equal(first.frames, second.frames) and torch.equal(first.samples, second.samples)
    assert not torch.equal(first.frames, other.frames)


def test_noise_is_drawn_in_the_published_order(pipe: Pipeline) -> None:
    clip = pipe(PROMPT, **SHORT, seed=3)
    generator = torch.Generator().manual_seed(3)
    audio = torch.randn(1, 76, 64, generator=generator)
    video = torch.randn(1, 48, 19, 4, 6, generator=generator)
    with pipe.parts.using("distill") as model:
        video, audio = sample(model, video, audio, clip.latents.text, noise=generator, progress=False)
    torch.randn(video.shape, generator=generator), torch.randn(audio.shape, generator=generator)
    with pipe.parts.using("540p_sr") as model:
        large = super_resolve(model, video, audio, clip.latents.text, (6, 10), noise=generator, progress=False)
    assert torch.equal(clip.latents.audio, audio)
    assert torch.equal(clip.latents.video, large)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_a_given_sound_is_held_by_both_samplers(pipe: Pipeline, sound: Path) -> None:
    clip = pipe(PROMPT, audio=sound, stages=1, **SHORT)
    assert clip.latents.audio.shape == (1, 75, 64) and clip.latents.video.shape[2] == 19
    assert clip.samples.shape == (2, int(75 * 2048 * 441 / 512))
    made = run_of(pipe, dataclasses.replace(clip.request, first="base"))
    text = clip.latents.text
    video, audio = made.denoise(text, text[:, :2], None, clip.latents.audio)
    assert torch.equal(audio, clip.latents.audio)
    assert not torch.equal(video, clip.latents.video)


@pytest.mark.usefixtures("few_steps")
def test_the_negative_prompt_reaches_the_base_model(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPT, first="base", negative_prompt=negative, **SMALL) for negative in (None, "blue"))
    assert not torch.equal(first.latents.video, second.latents.video)


@pytest.mark.parametrize(("stage", "step"), [("super-resolve", 2), ("decode video", 25)])
def test_a_run_that_is_interrupted_goes_on_to_the_same_clip(
    pipe: Pipeline, whole: Clip, tmp_path: Path, stage: str, step: int
) -> None:
    out = tmp_path / "films" / "x.mp4"
    out.parent.mkdir()

    def stop(info: StageInfo) -> None:
        if (info.stage, info.step) == (stage, step):
            raise KeyboardInterrupt

    with (
        logs(r"kept in .*x\.latents\.safetensors: resume goes on"),
        pytest.raises(KeyboardInterrupt),
    ):
        pipe(PROMPT, **SHORT, out=out, callback=stop)
    (left,) = out.parent.iterdir()
    assert left.name == "x.latents.safetensors", "the latents, and nothing half-written"
    assert read_latents(left).done == ("denoise" if stage == "super-resolve" else "super-resolve")
    resumed = pipe(resume=left, progress=False)
    assert resumed.frames is not None and whole.frames is not None
    assert torch.equal(resumed.frames, whole.frames) and torch.equal(resumed.samples, whole.samples)
    assert read_latents(left).whole


def test_what_is_interrupted_before_there_are_latents_leaves_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "films" / "x.mp4"
    out.parent.mkdir()

    def stop(info: StageInfo) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe(PROMPT, **SHORT, out=out, callback=stop)
    assert list(out.parent.iterdir()) == []


def test_the_time_left_falls_to_nothing(pipe: Pipeline) -> None:
    infos: list[StageInfo] = []
    pipe(PROMPT, **SHORT, callback=infos.append)
    assert infos[0].stage == "text" and infos[-1].stage == "decode video"
    assert infos[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert all(info.seconds_left is None or info.seconds_left >= 0 for info in infos)


def test_a_second_clip_reads_nothing_and_is_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAPPYHORSE_FAST_PROMPT_CACHE", "0")
    monkeypatch.setattr(residency, "available_bytes", lambda: 1 << 34)
    reads: list[str] = []
    for name in ("parts.load", "parts.load_turbo", "text.TextEncoder.load", "audio.AudioCodec.load"):
        whole = f"happyhorse_fast.pipeline.{name}"
        function = pydoc.locate(whole)
        assert callable(function)
        monkeypatch.setattr(whole, lambda *a, f=function, n=name, **k: (reads.append(n), f(*a, **k))[1])
    made = Pipeline.from_pretrained(tiny, precision="bf16", device="cpu")
    first, second = (made(PROMPT, **SMALL) for _ in range(2))
    assert len(reads) == 4 and made.parts.residency.held == ()
    assert first.frames is not None and second.frames is not None
    assert torch.equal(first.frames, second.frames) and torch.equal(first.samples, second.samples)


def test_torchs_settings_do_not_reach_a_clip(tiny: Path, whole: Clip) -> None:
    made = Pipeline.from_pretrained(tiny, precision=None, device="cpu")
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        clip = made(PROMPT, **SHORT)
    assert clip.frames is not None and whole.frames is not None and clip.frames.device.type == "cpu"
    assert torch.equal(clip.frames, whole.frames) and torch.equal(clip.samples, whole.samples)


def test_parts_are_on_the_device_one_at_a_time_or_stay(tiny: Path) -> None:
    held: dict[str, set[tuple[str, ...]]] = {}
    for placement in ("sequential", "resident"):
        made = Pipeline.from_pretrained(tiny, precision="bf16", placement=placement, device="cpu")  # type: ignore[arg-type]
        seen = held[placement] = set()
        made(PROMPT, **SMALL, callback=lambda info, seen=seen, made=made: seen.add(made.parts.residency.held))
        if placement == "sequential":
            assert made.parts.residency.held == ()
    assert max(map(len, held["sequential"])) == 1
    assert ("distill", "audio_decoder", "video_decoder") in held["resident"]


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


FAULTS: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (remove("540p_sr"), FileNotFoundError, r"second stage at 540p \(540p_sr\) is not there.*nothing is downloaded"),
    (remove("t5gemma-9b-9b-ul2"), FileNotFoundError, r"text encoder .*\(Gemma terms of use"),
    (remove("stable-audio-open-1.0"), FileNotFoundError, r"audio autoencoder .*Stability AI Community License"),
    (remove("turbo_vae"), FileNotFoundError, "turbo video decoder"),
    (cut("distill/model-00001-of-00002.safetensors"), CheckpointError, "truncated"),
    (cut("540p_sr/model-00002-of-00002.safetensors"), CheckpointError, "truncated"),
    (cut("t5gemma-9b-9b-ul2/model-00001-of-00004.safetensors"), CheckpointError, "truncated"),
    (cut("stable-audio-open-1.0/vae/diffusion_pytorch_model.safetensors"), CheckpointError, "truncated"),
    (cut("turbo_vae/checkpoint-340000.ckpt"), CheckpointError, r"checkpoint-340000\.ckpt"),
]


@pytest.mark.parametrize(("change", "error", "message"), FAULTS)
def test_faulty_parts_are_named_before_anything_runs(
    broken: Callable[..., Path], change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    made = Pipeline.from_pretrained(broken(change), precision=None, device="cpu")
    with pytest.raises(error, match=message):
        made(PROMPT, **SHORT, callback=lambda info: pytest.fail(f"{info.stage} ran"))


def test_the_codec_of_pictures_is_asked_for_where_there_is_one(broken: Callable[..., Path], picture: Path) -> None:
    made = Pipeline.from_pretrained(broken(remove("Wan2.2-TI2V-5B-Diffusers")), precision=None, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"video autoencoder \(video_vae\) is not there"):
        made(PROMPT, **SHORT, image=picture, callback=lambda info: pytest.fail(f"{info.stage} ran"))
    made.parts.check(Request(prompt=PROMPT, seconds=3, resolution="540p"), {PROMPT: None})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": "a"}, ValueError, r"prompt is too short for the model 540p_sr: text must have at least 2 tokens"),
        ({"prompt": "half a horse: \ud83d"}, ValueError, r"prompt must be Unicode, got '\\ud83d' in it"),
        ({"fps": 24}, ValueError, "fps must be 25"),
        ({"image": "gone.png"}, FileNotFoundError, r"image must be a file, gone\.png is none"),
        ({"image": np.zeros((900, 1), np.uint8)}, ValueError, "image must not be so narrow: 1 x 900"),
        ({"audio": "gone.wav"}, FileNotFoundError, r"gone\.wav"),
        ({"out": "gone/x.mp4"}, FileNotFoundError, "output must be in a folder that exists"),
        ({"out": "x.avi"}, ValueError, r"out must end with \.mp4, for that is what is written; got x\.avi"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"resume": "gone.safetensors"}, FileNotFoundError, "resume must be a file of latents"),
    ],
)
def test_bad_arguments_are_named_before_the_long_work(
    pipe: Pipeline, change: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "encode_text", lambda *_: pytest.fail("a stage ran"))
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, **SHORT, **change})


def test_an_embedding_of_another_encoder_is_named_before_a_model_loads(
    pipe: Pipeline, whole: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.zeros(1, dtype=torch.uint8)
    first = whole.request.first_tokens
    video, text = torch.zeros(1, 48, first.T, first.H, first.W), torch.zeros(1, 5, 64)
    Latents(whole.request, "denoise", video, whole.latents.audio, text, None, noise, "cpu").save(tmp_path / "l")
    monkeypatch.setattr(Run, "__init__", lambda *_, **__: pytest.fail("a stage runs"))
    with pytest.raises(ValueError, match="the model distill takes embeddings of width 96, text has 64"):
        pipe(resume=tmp_path / "l", progress=False)


@pytest.mark.parametrize(
    ("name", "message"), [("x.mp4", "out must be another file than that"), ("kept.safetensors", "must not exist yet")]
)
def test_the_latents_replace_nothing_unasked(pipe: Pipeline, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "kept.safetensors").write_text("of an earlier run")
    with pytest.raises((ValueError, FileExistsError), match=message):
        pipe(PROMPT, **SHORT, out=tmp_path / "x.mp4", latents=tmp_path / name)


def test_libraries_of_another_version_are_refused_before_anything_runs(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.0")
    with pytest.raises(ImportError, match=r"transformers is of version 4\.56\.0, which must be >= 5\.20 and < 6"):
        pipe(PROMPT, **SHORT, callback=lambda info: pytest.fail(f"{info.stage} ran"))
    monkeypatch.setattr(sys.modules["diffusers"], "__version__", "0.30.0")
    with pytest.raises(ImportError, match=r"diffusers is of version 0\.30\.0"):
        pipe(PROMPT, **SHORT, callback=lambda info: pytest.fail(f"{info.stage} ran"))


def test_a_disk_without_room_is_told_before_anything_runs(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    with pytest.raises(OSError, match=r"output must have room for .* MB of latents and film, .* has 0\.1 MB"):
        pipe(PROMPT, **SHORT, out=tmp_path / "x.mp4", callback=lambda info: pytest.fail(f"{info.stage} ran"))


def test_room_is_looked_for_where_the_film_goes(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link.mp4").symlink_to("large/x.mp4")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 if Path(path).name == "large" else 0)
    )
    assert pipe(PROMPT, **SMALL, out=tmp_path / "link.mp4").path == tmp_path / "link.mp4"
    assert film(tmp_path / "large" / "x.mp4")[2] == FRAMES


def test_a_film_goes_into_a_pipe(pipe: Pipeline, tmp_path: Path) -> None:
    end, out = os.pipe()
    found: list[bytes] = []
    with os.fdopen(end, "rb") as stream:
        reader = threading.Thread(target=lambda: found.append(stream.read()))
        reader.start()
        try:
            pipe(PROMPT, **SMALL, out=f"/dev/fd/{out}")
        finally:
            os.close(out)
            reader.join()
    (tmp_path / "x.mp4").write_bytes(found[0])
    assert film(tmp_path / "x.mp4")[2] == FRAMES


def test_noise_goes_on_where_it_began_alone(pipe: Pipeline) -> None:
    request, none = Request(prompt="x"), torch.empty(0)
    elsewhere = Latents(request, "denoise", none, none, none, None, none, noise_device="cuda")
    with pytest.raises(ValueError, match="must go on with noise of cuda, on which it began; this run's is of cpu"):
        run_of(pipe, request, begun=elsewhere)


def test_the_other_decoder(tiny: Path) -> None:
    made = Pipeline.from_pretrained(tiny, precision=None, device="cpu", decoder="wan", placement="resident")
    with made.parts.using("video_decoder") as decoder:
        assert isinstance(decoder, WanCodec)
    latents = torch.randn(1, 48, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    frames: list[torch.Tensor] = []
    run_of(made, Request(prompt="x")).decode_video(latents, lambda _, some: frames.append(some))
    assert torch.equal(
        torch.cat(frames), to_uint8(torch.cat(list(decoder.windows(latents)), dim=2))[0].permute(1, 2, 3, 0)
    )


def test_without_a_model_the_command_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", PROMPT]) == 2
    said = capsys.readouterr().err
    for words in ("GAIR/daVinci-MagiHuman", "examples/tiny_checkpoint.py", "happyhorse-fast demo"):
        assert words in said
