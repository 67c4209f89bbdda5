"""A package that is installed but does not import counts as missing: its message is kept, the rest goes on."""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import happyhorse_fast as hh
from happyhorse_fast import optional
from happyhorse_fast.block_map import from_ranges
from happyhorse_fast.cli import demo, doctor, run
from happyhorse_fast.ops.runtime import dispatch
from happyhorse_fast.ops.runtime.cuda import errors, status
from happyhorse_fast.pony.media import read_image
from happyhorse_fast.verify import fidelity, forms

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
RAISES = {
    "RuntimeError": 'raise RuntimeError("built for another [machine]\\nsecond line")',
    "OSError": 'raise OSError("libnothing.so.7: cannot open shared object file")',
    "AttributeError": "import sys; sys.no_such_attribute",
    "ImportError": 'raise ImportError("cannot import name x")',
    "ModuleNotFoundError": "import a_module_that_is_not_there",
    "SyntaxError": "def broken(:",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: Patch) -> Any:
    """Makes packages raise when they are imported."""

    def make(*packages: str, how: str = "RuntimeError") -> None:
        for package in packages:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                monkeypatch.delitem(sys.modules, name)
            folder = tmp_path / "packages" / package.replace(".", "/")
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(RAISES[how] + "\n")
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        monkeypatch.setattr(optional, "_BROKEN", {})

    return make


@pytest.mark.parametrize("how", RAISES)
def test_why_not_is_kept(how: str, broken: Any) -> None:
    broken("av", how=how)
    found = optional.obstacle("av")
    assert found is not None and found.startswith(f"av is installed but does not import: {how}")
    assert "\n" not in found
    with pytest.raises(ImportError, match="reading a picture needs av: av is installed but does not import"):
        read_image(Path(__file__))


def test_a_package_that_is_not_there_is_named_with_its_extra() -> None:
    assert optional.obstacle("a_module_that_is_not_there") == "a_module_that_is_not_there is not installed"
    assert optional.obstacle("json") is None


@pytest.mark.parametrize(
    ("found", "fits"),
    [("5.20.0", True), ("5.24.0.dev0", True), ("4.56.0", False), ("5.9", False), ("6.0.0", False), ("", False)],
)
def test_a_version_that_does_not_fit_is_named(found: str, fits: bool, monkeypatch: Patch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", found)
    why = (
        f"transformers is of version {found or 'unknown'}, which must be >= 5.20 and < 6 "
        '(pip install "happyhorse-fast[pipeline]")'
    )
    assert optional.obstacle("transformers") == (None if fits else why)


def test_an_av_that_does_not_turn_pictures_is_named(monkeypatch: Patch) -> None:
    import av

    monkeypatch.setattr(av, "__version__", "14.0.1")
    why = r'av is of version 14.0.1, which must be >= 14.1 \(pip install "happyhorse-fast\[video\]"\)'
    with pytest.raises(ImportError, match=f"reading a picture needs av: {why}"):
        read_image(Path(__file__))


def test_versions_that_fit_are_those_the_extras_ask_for() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    asked = {name: tuple(versions.split(",")) for name, versions in re.findall(r'"(\w+)([<>]=[\d.,<]+)"', text)}
    known = {
        name: (">=" + ".".join(map(str, least)), *(["<" + ".".join(map(str, below))] if below else []))
        for name, (least, below) in optional.VERSIONS.items()
    }
    assert {name: asked[name] for name in known} == known


@pytest.mark.parametrize("how", RAISES)
def test_a_broken_triton_is_an_obstacle(how: str, broken: Any, monkeypatch: Patch) -> None:
    broken("triton", how=how)
    for device in ("cuda", "cpu"):
        found = dispatch.triton_obstacle(torch.device(device))
        assert found is not None and found.startswith(f"Triton is installed but does not import: {how}")
    monkeypatch.setattr(dispatch, "cuda_obstacle", lambda device: "no driver")
    monkeypatch.setattr(dispatch, "preferred", lambda precision, device: ())
    choices = dispatch.choose("auto", "fp8", torch.device("cuda"))
    assert {choice.backend for choice in choices.values()} == {"reference"}
    assert how in choices["fp8_linear"].reason
    with pytest.raises(hh.BackendError, match=f"backend 'triton' cannot run: Triton is installed but .*{how}"):
        dispatch.choose("triton", "bf16", torch.device("cuda"))
    with demo.interpreted_kernels() as checked:
        assert how in (checked()[1] or "")


GOES_ON = """
import tempfile, torch, happyhorse_fast as hh
from happyhorse_fast import golden
from happyhorse_fast.cli import run
case = golden.load_case("local_v1_fp32")
inputs = [case.tensors[f"in.{name}"] for name in ("video", "audio", "text")]
with torch.device("meta"):
    hh.HappyHorse(case.config)
folder = tempfile.mkdtemp() + "/checkpoint"
hh.save_checkpoint(case.state_dict(), folder)
eager = hh.load(folder, config=case.config, progress=False)
video, audio = hh.sample(eager, *inputs, steps=1, progress=False)
hh.super_resolve(eager, video, audio, inputs[2], tuple(video.shape[3:]), steps=1, progress=False)
for fast in (hh.FastConfig(backend="reference"), hh.FastConfig()):
    hh.accelerate(eager, fast)(*inputs)
    hh.restore(eager)
assert run(["doctor"]) == 0
"""


@pytest.mark.slow  # 9 s
def test_a_process_with_a_broken_triton_goes_on(tmp_path: Path) -> None:
    """torch's own tracer raises where Triton does anything but be missing, so nothing may have loaded it before."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(RAISES["RuntimeError"] + "\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GOES_ON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reason = "Triton is installed but does not import: RuntimeError: built for another [machine]"
    assert f"every op runs in plain torch (backend reference): {reason}" in done.stderr
    assert reason in " ".join(done.stdout.split())


@pytest.mark.parametrize("how", RAISES)
def test_broken_cuda_bindings_are_an_obstacle(how: str, broken: Any) -> None:
    broken("cuda", how=how)
    with pytest.raises(errors.CudaError, match="cuda-bindings is "):
        errors.bindings("driver")
    found = dispatch.cuda_obstacle(torch.device("cuda"))
    assert found is not None and "cuda-bindings" in found
    assert "cuda-bindings" in status.examine()["nvrtc"]["why"]


def test_a_broken_host_module_is_an_obstacle(monkeypatch: Patch) -> None:
    class Finder:
        """Finds the module, which then raises."""

        def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, self) if name == "happyhorse_fast._C" else None  # type: ignore[arg-type]

        def create_module(self, spec: object) -> None:
            return None

        def exec_module(self, module: object) -> None:
            raise OSError("undefined symbol [x]")

    from_ranges.host_module_obstacle.cache_clear()
    monkeypatch.delattr(hh, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "happyhorse_fast._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert from_ranges.host_module_obstacle() == "happyhorse_fast._C cannot be loaded: OSError: undefined symbol [x]"
    from_ranges.host_module_obstacle.cache_clear()


def test_doctor_says_what_is_broken(broken: Any, monkeypatch: Patch, capsys: Capture) -> None:
    broken("triton", "cuda", "av", "diffusers", "matplotlib", "transformers")
    monkeypatch.setattr(doctor, "examine", functools.cache(doctor.examine))
    assert run(["doctor", "--json"]) == 0
    runs = {line["what"]: line for line in json.loads(capsys.readouterr().out)["runs"]}
    for what in ("fast bfloat16 kernels", *doctor._OPTIONAL.values()):
        assert runs[what]["runs"] is False
        assert "does not import: RuntimeError: built for another [machine]" in runs[what]["why"]
    assert run(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("built for another [machine]") >= 4


def test_doctor_survives_tools_that_hang_or_do_not_start(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: "/there")
    for error in (doctor.subprocess.TimeoutExpired("nvidia-smi", 30), PermissionError("not to be run")):

        def run_tool(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(doctor.subprocess, "run", run_tool)
        assert doctor._first_match(["nvidia-smi"], r"[\d.]+") is None
        assert doctor._nvcc() == {"path": "/there", "version": "unknown"}


def test_guided_sampling_names_a_broken_diffusers(broken: Any) -> None:
    from toy_denoiser import Toy, clip

    broken("diffusers")
    model, inputs = Toy(), clip()
    with pytest.raises(ImportError, match="needs diffusers: diffusers is installed but does not import: RuntimeError"):
        hh.sample(model, *inputs, guidance=5.0, null_text=inputs[2], progress=False)
    assert model.calls == []


# demo -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_check(monkeypatch: Patch) -> None:
    monkeypatch.setattr(forms, "FORMS", forms.FORMS[:3])  # those of 8 bits take most of the time
    monkeypatch.setattr(demo, "CHECK", [sys.executable, "-c", "raise SystemExit('not here')"])


@pytest.mark.usefixtures("no_check")
def test_demo_names_what_is_broken_before_the_work(
    broken: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    broken("av", "matplotlib")
    said: list[str] = []
    make_clips = fidelity.make_clips

    def noted(*given: Any, **options: Any) -> Any:
        said.append(capsys.readouterr().err)
        return make_clips(*given, **options)

    monkeypatch.setattr(fidelity, "make_clips", noted)
    assert run(["demo", "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    assert "no clip.mp4: av is installed but does not import" in said[0]
    assert "no clip.png: matplotlib is installed but does not import" in said[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.safetensors"]
    assert "no clip.mp4: av is installed but does not import: RuntimeError" in capsys.readouterr().out


@pytest.mark.usefixtures("no_check")
def test_demo_saves_the_rest_where_a_writer_fails(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    from happyhorse_fast.pony import media

    def fails(path: Path, *_: object) -> None:
        path.write_text("half")
        raise RuntimeError("no encoder [libx264]")

    monkeypatch.setattr(media, "write_mp4", fails)
    assert run(["demo", "--out", str(tmp_path), "--steps", "1"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.png", "clip.safetensors"]
    assert "no clip.mp4: RuntimeError: no encoder [libx264]" in capsys.readouterr().out
