"""``demo``: a prompt, and a picture, become a clip with sound; kernels are checked in the interpreter beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import load_file

from happyhorse_fast.cli import demo, run
from happyhorse_fast.ops.runtime.formats import VARIANTS
from happyhorse_fast.pony import encode_image
from happyhorse_fast.pony.media import read_image
from happyhorse_fast.verify.forms import FORMS

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def no_sheet(monkeypatch: Patch) -> None:
    """Without the contact sheet, which takes a second."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def no_check(monkeypatch: Patch) -> None:
    """Without the check of the kernels, which takes longer than everything else."""
    answers(monkeypatch, "raise SystemExit('not here')")


@pytest.fixture
def few_forms(monkeypatch: Patch) -> None:
    """Without the forms of 8 bits, which take most of a clip's seconds."""
    monkeypatch.setattr("happyhorse_fast.verify.forms.FORMS", FORMS[:3])


def answers(monkeypatch: Patch, script: str) -> None:
    """Let a script run in place of the check."""
    monkeypatch.setattr(demo, "CHECK", [sys.executable, "-c", script])


def made(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    assert run(["demo", *map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: Capture) -> None:
    data = made(capsys, "--out", tmp_path / "new" / "demo")
    assert data["prompt"] == "a large red ball bounces twice"
    forms = {form["form"]: form for form in data["forms"]}
    assert list(forms) == ["eager float32", "eager bfloat16", "fast bfloat16", "fast int8", "fast fp8"]
    for name in ("eager bfloat16", "fast bfloat16"):
        assert 0 < forms[name]["video_error"] < 5e-2, f"measured {forms[name]}"
        assert forms[name]["psnr_db"] > 45, f"measured {forms[name]}"
    assert forms["fast fp8"]["psnr_db"] > 25, f"measured {forms['fast fp8']}"
    variants = [(op, variant) for op, of in VARIANTS["triton"].items() for variant in of]
    assert sorted((check["op"], check["variant"]) for check in data["kernels"]) == sorted(variants)
    assert all(check["passed"] for check in data["kernels"]), f"measured {data['kernels']}"
    with av.open(data["clip"]) as container:
        assert len(list(container.decode(video=0))) == 49
    assert Path(data["sheet"]).read_bytes()[:4] == b"\x89PNG"
    assert load_file(data["latents"])["fast fp8.video"].shape == (1, 48, 13, 8, 8)
    assert sorted(p.name for p in Path(data["clip"]).parent.iterdir()) == ["clip.mp4", "clip.png", "clip.safetensors"]


@pytest.mark.usefixtures("no_check")
def test_tables_say_what_was_made_and_why_no_kernel_ran(tmp_path: Path, capsys: Capture) -> None:
    assert run(["demo", "--out", str(tmp_path), "--steps", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("eager float32", "fast fp8", "audio error", "clip with sound", "exit code 1, not here"):
        assert words in text


JPEG = pytest.param("a.jpg", "mjpeg", "yuvj444p", marks=pytest.mark.slow)


@pytest.mark.usefixtures("no_check", "no_sheet", "few_forms")
@pytest.mark.parametrize(("name", "codec", "pixels"), [("a.png", "png", "rgb24"), JPEG])
def test_a_picture_begins_the_clip(name: str, codec: str, pixels: str, tmp_path: Path, capsys: Capture) -> None:
    rows, columns = np.mgrid[0:96, 0:200]
    picture = np.stack([columns, 2 * rows, 0 * rows + 40], axis=2).astype(np.uint8)  # 200 x 96: sides are cut off
    with av.open(str(tmp_path / name), "w", format="image2") as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = 200, 96, pixels
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    image = read_image(tmp_path / name)
    assert image.shape == (128, 128, 3) and 0 <= float(image.min()) < float(image.max()) <= 1
    # Columns 52 to 147 of 200, each 4/3 of a pixel wide in the result.
    assert image[64, [0, 127], 0].mul(255).tolist() == pytest.approx([52, 147], abs=6)
    assert image[[0, 127], 64, 1].mul(255).tolist() == pytest.approx([0, 190], abs=8)
    data = made(capsys, "--image", tmp_path / name, "--out", tmp_path / "out", "--steps", 1)
    assert data["image"] == str(tmp_path / name)
    latent = load_file(data["latents"])["eager float32.video"]
    assert latent[:, :, :1].equal(encode_image(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a horse"], "'a large red ball bounces twice'; got 'a horse'"),
        (["--image", "nowhere.png"], "image must be a file, nowhere.png is none"),
        (["--image", __file__], "image must be a picture such as a PNG or JPEG"),
        (["--out", __file__], "output must be a folder"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert run(["demo", *arguments, *out]) == 2
    text, error = capsys.readouterr()
    assert text == ""
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_check", "few_forms")
def test_without_optional_packages_the_rest_is_made(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    for package in ("matplotlib", "av"):
        monkeypatch.setitem(sys.modules, package, None)
    data = made(capsys, "--out", tmp_path, "--steps", 1)
    assert (data["clip"], data["sheet"]) == (None, None)
    assert "happyhorse-fast[video]" in data["why_no_clip"]
    assert "happyhorse-fast[plot]" in data["why_no_sheet"]
    assert [p.name for p in tmp_path.iterdir()] == ["clip.safetensors"]


# Kernels in the interpreter -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_sheet", "few_forms")
def test_a_wrong_kernel_fails_the_demo(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    found = {"op": "fp8_linear", "variant": "int8", "passed": False, "detail": "worst tile distance 8.0e-04"}
    answers(monkeypatch, f"print({json.dumps({'kernels': [found]})!r}); raise SystemExit(1)")
    assert run(["demo", "--out", str(tmp_path), "--steps", "1"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "FAIL" in shown and "fp8_linear int8: worst tile distance 8.0e-04" in shown


def test_the_check_ends_with_its_caller(monkeypatch: Patch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with demo.interpreted_kernels():
        (process,) = started
        assert process.poll() is None
    assert process.returncode is not None and process.returncode < 0
