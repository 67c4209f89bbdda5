"""`sample`: what it prints and writes, its exit codes, and that no file is ever left half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import fails
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from happyhorse_fast import __version__, golden
from happyhorse_fast.checkpoint.load import save_checkpoint
from happyhorse_fast.cli import run
from happyhorse_fast.sampler import StepInfo
from happyhorse_fast.verify import fidelity

torch.set_num_threads(1)

Json = Callable[..., dict[str, Any]]
Published = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Folder with a sharded checkpoint, config.json and inputs.safetensors of a recorded case."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            case, folder = golden.load_case(name), tmp_path_factory.mktemp(name)
            state = case.state_dict()
            size = sum(t.nbytes for t in state.values())
            save_checkpoint(state, folder / "model", max_shard_bytes=size // 3)
            assert len(list((folder / "model").glob("*.safetensors"))) > 2
            (folder / "config.json").write_text(json.dumps(case.config.to_dict()))
            keys = ("in.base.video", "in.base.audio") if "in.base.video" in case.tensors else ("in.video", "in.audio")
            inputs = {"in.text": case.tensors["in.text"]}
            inputs |= {key.replace("base.", ""): case.tensors[key] for key in keys}
            save_file(inputs, folder / "inputs.safetensors")
            made[name] = folder
        return made[name]

    return make


def sampling(folder: Path, output: Path, *more: object, inputs: str = "inputs.safetensors") -> list[str]:
    arguments = ["sample", folder / "model", folder / inputs, output, "--config", folder / "config.json"]
    return [*map(str, arguments), "--device", "cpu", "--dtype", "float32", *map(str, more)]


@pytest.mark.parametrize(("name", "own_process"), [("dense_v2_fp32", True), ("local_d128_fp32", False)])
def test_a_sharded_checkpoint_reproduces_the_recorded_latents(
    name: str, own_process: bool, published: Published, tmp_path: Path, as_json: Json
) -> None:
    case, output = golden.load_case(name), tmp_path / "latents.safetensors"
    arguments = sampling(published(name), output, "--seed", case.seed)
    if own_process:  # 3 s, for torch
        program = [sys.executable, "-c", "from happyhorse_fast.cli import main; main()", *arguments, "--json"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        data = json.loads(done.stdout)
    else:
        data = as_json(*arguments)
    latents = load_file(output)
    errors = {key: relative_l2(latents[key], case.tensors[f"sampler.final.{key}"]) for key in ("video", "audio")}
    assert max(errors.values()) <= 1e-4, f"measured {errors}"
    assert len(data["seconds_per_step"]) == 8
    with safe_open(output, framework="pt") as file:
        settings = file.metadata()
    assert settings["version"] == __version__
    assert settings["seed"] == str(case.seed)
    assert json.loads(settings["sigmas"]) == pytest.approx(case.tensors["sampler.sigmas"].tolist())
    assert [p.name for p in tmp_path.iterdir()] == [output.name]


def test_recorded_noise_is_replayed(published: Published, tmp_path: Path, as_json: Json) -> None:
    case, folder = golden.load_case("dense_v2_fp32"), published("dense_v2_fp32")
    inputs = {key.removeprefix("in."): case.tensors[key] for key in ("in.video", "in.audio", "in.text")}
    for i in range(7):
        for name in ("video", "audio"):
            inputs[f"noise.{name}.{i}"] = case.draw(f"noise.{name}.{i}", inputs[name].shape)
    save_file({**inputs, "imgae": torch.zeros(1)}, folder / "replay.safetensors")
    data = as_json(*sampling(folder, tmp_path / "out.safetensors", inputs="replay.safetensors"))
    error = relative_l2(load_file(tmp_path / "out.safetensors")["video"], case.tensors["sampler.final.video"])
    assert error <= 1e-4, f"measured {error:.2e}"
    assert data["ignored"] == ["imgae"]
    assert data["settings"]["noise"] == "recorded in the inputs"


def test_recorded_noise_that_is_incomplete_is_named(published: Published, tmp_path: Path, capsys: Capture) -> None:
    folder = published("dense_v2_fp32")
    tensors = load_file(folder / "inputs.safetensors")
    save_file({**tensors, "noise.video.0": torch.randn(tensors["in.video"].shape)}, folder / "part.safetensors")
    arguments = sampling(folder, tmp_path / "out.safetensors", "--json", inputs="part.safetensors")
    assert "but no noise.audio.0" in fails(capsys, *arguments)


def test_a_length_without_a_resolution_is_refused(published: Published, tmp_path: Path, capsys: Capture) -> None:
    arguments = sampling(published("dense_v2_fp32"), tmp_path / "out.safetensors", "--seconds", 10, "--fps", 25)
    assert "--seconds and --fps must come with --resolution" in fails(capsys, *arguments)


def test_starting_noise_is_made_for_a_resolution(published: Published, tmp_path: Path, as_json: Json) -> None:
    folder = published("dense_v2_fp32")
    text = load_file(folder / "inputs.safetensors")["in.text"]
    save_file({"text": text, "image": torch.zeros(1, 48, 1, 16, 16)}, folder / "text.safetensors")
    options = ["--resolution", "256p", "--aspect", "1:1", "--seconds", 3, "--steps", 1, "--seed", 3]
    data = as_json(*sampling(folder, tmp_path / "out.safetensors", *options, inputs="text.safetensors"))
    assert (data["video"], data["audio"]) == ([1, 48, 19, 16, 16], [1, 73, 64])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["video"][:, :, 0], torch.zeros(1, 48, 16, 16))


def test_two_stages(published: Published, tmp_path: Path, as_json: Json) -> None:
    folder, case = published("sr_v1_fp32"), golden.load_case("sr_v1_fp32")
    second = ["--sr-checkpoint", folder / "model", "--sr-config", folder / "config.json", "--size", 12, 16]
    data = as_json(*sampling(folder, tmp_path / "out.safetensors", "--steps", 1, "--sr-steps", 2, *second))
    assert data["video"] == list(case.tensors["sr.start.video"].shape)
    assert data["audio"] == list(case.tensors["in.base.audio"].shape)
    assert len(data["settings"]["sr_sigmas"]) == 3
    assert len(data["seconds_per_step"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", 8, 8], "--sr-checkpoint and --size must come together"),
        (["--resolution", "256p"], "--resolution makes the starting noise, but"),
        (["--image-key", "picture"], "--image-key names picture, got audio, text, video"),
        (["--preset", "tiny"], "exactly one of preset and config"),
        (["--guidance", 5], "null_text"),
        (["--device", "cuda:9"], "device must be one that this machine has"),
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--dtype", "int8"], "int8"),
        (["--seed", -1], "seed"),
    ],
)
def test_bad_sampling_input_is_one_line(
    options: list[object], message: str, published: Published, tmp_path: Path, capsys: Capture
) -> None:
    arguments = sampling(published("dense_v2_fp32"), tmp_path / "out.safetensors", *options, "--json")
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--guidance", 5], "guidance must come with null_text"),
        (["--shift", -1], "shift must be finite and more than 0"),
        (["--fast", "bf16"], "--dtype must be left out or bfloat16 with --fast, got float32"),
        (["--sr-checkpoint", "nowhere", "--size", 12, 16], "exactly one of --sr-preset and --sr-config is required"),
        (["--sr-checkpoint", "nowhere", "--size", 12, 16, "--sr-preset", "tiny"], "nowhere"),
        (["--sr-checkpoint", "MODEL", "--size", 2, 4, "--sr-config", "CONFIG"], "of size, in latent positions"),
        (["--sr-checkpoint", "MODEL", "--size", 12, 16, "--sr-config", "CONFIG", "--sr-steps", 0], "steps must be"),
    ],
)
def test_what_can_be_known_before_the_weights_are_read_is(
    options: list[object], message: str, published: Published, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Loading 15B takes minutes, and a first stage is lost where the second cannot run."""
    folder = published("dense_v2_fp32")
    monkeypatch.setattr("happyhorse_fast.checkpoint.load.load", lambda *_, **__: pytest.fail("loaded"))
    named = {"MODEL": folder / "model", "CONFIG": folder / "config.json"}
    arguments = [named.get(str(option), option) for option in options]
    assert message in fails(capsys, *sampling(folder, tmp_path / "out.safetensors", *arguments, "--json"))


def test_an_output_that_cannot_be_written_is_known_before_the_work(
    published: Published, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr("happyhorse_fast.checkpoint.load.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(fidelity, "make_clips", lambda *_, **__: pytest.fail("worked"))
    nowhere = Path("/proc/clip.safetensors")  # of all folders the one that root cannot write to either
    assert "/proc cannot" in fails(capsys, *sampling(published("dense_v2_fp32"), nowhere, "--json"))
    assert "/proc cannot" in fails(capsys, "demo", "--out", "/proc/a/b")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"in.video": (1,), "in.audio": (1,)}, "must hold text"),
        ({"in.text": (1, 4, 96), "video": (1, 48, 3, 4, 4)}, "both video and audio or neither, got only video"),
        ({"in.text": (1, 4, 96)}, "or --resolution must be given"),
        ({"in.text": (1, 4, 96), "text": (1, 4, 96)}, "holds both text and in.text"),
        ({"text": (1, 4, 96), "video": (1, 48, 3, 4, 5), "audio": (1, 9, 64)}, "video must have an even W"),
    ],
)
def test_bad_inputs_files_are_named(
    tensors: dict[str, tuple[int, ...]], message: str, published: Published, tmp_path: Path, capsys: Capture
) -> None:
    folder = published("dense_v2_fp32")
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "bad.safetensors")
    assert message in fails(capsys, *sampling(folder, tmp_path / "out.safetensors", "--json", inputs="bad.safetensors"))


def test_bad_files_are_named(published: Published, tmp_path: Path, capsys: Capture) -> None:
    folder, output = published("dense_v2_fp32"), tmp_path / "out.safetensors"
    assert "there is none at" in fails(capsys, *sampling(folder, output, inputs="nowhere.safetensors"))
    assert "must be a safetensors file" in fails(capsys, *sampling(folder, output, inputs="config.json"))
    assert "in a folder that exists" in fails(capsys, *sampling(folder, tmp_path / "no" / "out.safetensors"))
    assert "is a folder" in fails(capsys, *sampling(folder, tmp_path))
    (tmp_path / "config.json").write_text('{"num_layers": 3, "wings": 2}')
    assert "wings" in fails(capsys, *sampling(folder, output, "--config", tmp_path / "config.json", "--json"))
    (tmp_path / "config.json").write_text("[]")
    assert "JSON object" in fails(capsys, *sampling(folder, output, "--config", tmp_path / "config.json", "--json"))


def test_an_existing_output_is_kept_without_force(published: Published, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    arguments = sampling(published("dense_v2_fp32"), output, "--steps", 1)
    assert "--force replaces it" in fails(capsys, *arguments)
    assert output.read_bytes() == b"precious"
    assert run([*arguments, "--force"]) == 0
    assert "1 step in" in capsys.readouterr().out
    assert load_file(output).keys() == {"video", "audio"}
    assert "output must not be the file of inputs" in fails(
        capsys, *sampling(published("dense_v2_fp32"), output, "--force", inputs=str(output))
    )
    assert load_file(output).keys() == {"video", "audio"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there(
    error: BaseException, published: Published, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def half_written(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    arguments = sampling(published("dense_v2_fp32"), output, "--steps", 1, "--force", "--json")
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    fails(capsys, *arguments, code=code)
    assert [p.name for p in tmp_path.iterdir()] == [output.name]
    assert output.read_bytes() == b"precious"


@pytest.mark.usefixtures("sigint_raises")
def test_ctrl_c_exits_130_and_leaves_no_file(
    published: Published, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def press(step: int, *of_step: Any) -> StepInfo:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return StepInfo(step, *of_step)

    monkeypatch.setattr("happyhorse_fast.sampler.steps.StepInfo", press)
    arguments = sampling(published("dense_v2_fp32"), tmp_path / "out.safetensors", "--json")
    assert fails(capsys, *arguments, code=130) == "happyhorse-fast: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []
