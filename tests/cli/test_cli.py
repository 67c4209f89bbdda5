"""The command line: what the program and `plan` print, and its exit codes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import fails

from happyhorse_fast import __version__
from happyhorse_fast.cli import demo as demo_command
from happyhorse_fast.cli import run
from happyhorse_fast.verify import fidelity

torch.set_num_threads(1)

Json = Callable[..., dict[str, Any]]
Published = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


# The program ----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom happyhorse_fast.cli import run\nassert run(['--help']) == 0\n"
        "assert run(['sample', '--help']) == 0\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'matplotlib', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in ("demo", "sample", "verify", "plan", "doctor"))


def test_it_runs_as_a_module_from_a_checkout() -> None:
    """Where a checkout is used as it is there is no program happyhorse-fast."""
    command = [sys.executable, "-m", "happyhorse_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == f"happyhorse-fast {__version__}\n"


def test_version_and_no_command(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"happyhorse-fast {__version__}\n"
    assert run([]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_locale_lacks_is_printed_in_escapes(encoding: str) -> None:
    """Results are printed last: an error there would end a run whose files are written with exit code 2."""
    code = r"from happyhorse_fast import cli; cli.run = lambda: print('\u6700\udcff'); cli.main()"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=env)
    shown = "\u6700" if encoding == "utf-8" else r"\u6700"
    assert (done.returncode, done.stdout.decode()) == (0, rf"{shown}\udcff" + os.linesep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["plan", "--resolution", "4k"], "resolution must be one of 1080p, 540p, 256p; got '4k'"),
        (["plan", "--seconds", "99", "--no-memory"], "seconds must be a whole number from 3 to 15; got 99"),
        (["plan", "--seconds", "two"], "Invalid value for '--seconds'"),
        (["plan", "--preset", "pony-express"], "preset must be one of"),
        (["plan", "--gpu", "tpu"], "gpu must be one of h100"),
        (["plan", "--precision", "fp8", "--gpu", "a100"], "a100 has no fp8 tensor cores"),
        (["plan", "--attention", "fp8_qk"], "attention must be one of bf16, int8_qk, int8_qk_fp8_v, fp8; got 'fp8_qk'"),
        (["plan", "--attention", "fp8", "--gpu", "a100"], "a100 has no fp8 tensor cores"),
        (["plan", "--steps", "0"], "steps must be at least 1, got 0"),
        (["plan", "--decoder", "turbo"], "--decoder must come with --pipeline, got none"),
        (["demo", "--steps", "0"], "steps"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: Capture) -> None:
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp4"], "precision must be one of bf16, int8, fp8; got 'fp4'"),
        (["--top-k", "25"], "keep must be above 0 and at most 1, got 25.0"),
    ],
)
def test_verify_holds_a_form_before_the_clips(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(fidelity, "measure_fidelity", lambda *_, **__: pytest.fail("five minutes of clips"))
    assert message in fails(capsys, "verify", "--pony", "--fast", *arguments)


def test_verify_verifies_its_checkpoint_whatever_else_is_asked_for(
    tmp_path: Path, as_json: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passed, and exited with 0, without a look at the checkpoint."""
    verified: list[object] = []
    monkeypatch.setattr("happyhorse_fast.checkpoint.load.load", lambda path, *_, **__: path)
    monkeypatch.setattr("happyhorse_fast.cli.verify._check_kernels", lambda device: [])
    monkeypatch.setattr(
        "happyhorse_fast.verify.checks.verify_model", lambda model, *_, **__: verified.append(model) or []
    )
    data = as_json("verify", tmp_path, "--preset", "tiny", "--kernels")
    assert (verified, data["cases"], data["kernels"]) == ([str(tmp_path)], [], [])


def test_traceback_on_request() -> None:
    with pytest.raises(ValueError, match="4k"):
        run(["--traceback", "plan", "--resolution", "4k"])


def test_warnings_and_what_is_logged_are_lines_without_a_place_in_the_code(monkeypatch: Patch, capsys: Capture) -> None:
    package = logging.getLogger("happyhorse_fast")
    before = package.level, list(package.handlers)

    def said(_: Path) -> None:
        warnings.warn("slow", stacklevel=1)
        package.getChild("anywhere").info("%d of 2", 1)

    monkeypatch.setattr(demo_command, "require_folder", said)
    run(["demo", "--prompt", "a cat"])
    assert capsys.readouterr().err.splitlines()[:2] == ["happyhorse-fast: slow", "happyhorse-fast: 1 of 2"]
    assert (package.level, package.handlers) == before


def test_problems_of_several_lines_stay_apart(monkeypatch: Patch, capsys: Capture) -> None:
    def wrong(_: Path) -> None:
        raise ValueError("not the model:\n  one is missing\n  two is large")

    monkeypatch.setattr(demo_command, "require_folder", wrong)
    assert fails(capsys, "demo") == "happyhorse-fast: error: not the model: one is missing; two is large\n"


def test_out_of_memory_is_one_line(monkeypatch: Patch, capsys: Capture, tmp_path: Path) -> None:
    def too_large(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")

    monkeypatch.setattr(fidelity, "make_clips", too_large)
    assert "`happyhorse-fast plan` says what a clip needs" in fails(capsys, "demo", "--out", tmp_path, "--json", code=1)


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: Patch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(fidelity, "make_clips", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(["demo"])


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_has_the_promised_keys(as_json: Json) -> None:
    data = as_json("plan", "--preset", "happyhorse-1.0-15b", "--resolution", "256p", "--seconds", 3)
    assert data["memory"]["form"] == "fast bfloat16"
    assert data["peak_memory_gib"] == pytest.approx(28.9, abs=0.5)
    assert data["memory"]["fits_gb"] == [48, 80]
    assert data["launches_per_layer"] == 7
    assert {tuple(op) for op in data["ops"]} == {("op", "kind", "count", "flops", "bytes", "floor_ms")}
    assert {op["op"] for op in data["ops"]} >= {"norms", "qkv", "attention", "proj", "up", "down", "embed", "heads"}
    # Packed weights are padded by 0.3 % (7208 -> 7296 and 27304 -> 27392 rows).
    assert 1 < data["memory"]["peak"]["weight_bytes"] / data["parameters"]["bytes"] < 1.005
    assert data["totals"]["floor_s"] == pytest.approx(8 * data["totals"]["floor_ms_per_step"] / 1e3)


def test_plan_of_the_full_clip(as_json: Json, capsys: Capture) -> None:
    data = as_json("plan", "--no-memory", "--steps", 5)
    assert (data["tokens"]["total"], round(data["tokens"]["window_share"], 2)) == (64001, 0.60)
    assert f"{data['totals']['linear_flops'] / 1e15:.2f} {data['totals']['attention_flops'] / 1e15:.2f}" == "1.40 2.32"
    assert data["peak_memory_gib"] is None
    assert run(["plan", "--no-memory", "--video-share", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "64,001 tokens" in text
    assert "15.3 B parameters, 10.9 B active" in text
    assert "25% of video pairs" in text


@pytest.mark.slow
def test_plan_of_one_of_several_cards(as_json: Json, capsys: Capture) -> None:
    alone, data = (as_json("plan", "--resolution", "256p", "--seconds", 3, "--gpus", gpus) for gpus in (1, 4))
    weights = data["memory"]["peak"]["weight_bytes"]
    assert weights == alone["memory"]["peak"]["weight_bytes"], "weights are on every card"
    beside, before = (x["memory"]["peak"]["peak_bytes"] - weights for x in (data, alone))
    assert 0.2 < beside / before < 0.5
    assert data["totals"]["flops"] == pytest.approx(alone["totals"]["flops"] / 4)
    assert (alone["exchange"], alone["gpus"], data["gpus"]) == (None, 1, 4)
    rows, out = data["tokens"]["total"] / 4 * 3 / 4, 40 * 128 * 2
    assert data["exchange"]["bytes_per_step"] == pytest.approx(40 * rows * (out + 56 * 128 * 2 + 40 * 4))
    assert [x["link"]["bandwidth"] for x in data["exchange"]["links"]] == [450, 63]
    assert run(["plan", "--no-memory", "--gpus", "8"]) == 0
    assert "each of 8 cards sends 6.93 GB" in capsys.readouterr().out
    assert "divides the 8 key/value heads (1, 2, 4, 8), got 3" in fails(capsys, "plan", "--gpus", "3")
    shared = as_json("plan", "--resolution", "256p", "--seconds", 3, "--gpus", 4, "--shard-weights")["memory"]
    assert weights / 4 < shared["held_weight_bytes"] < 0.27 * weights, "embedders and heads are whole"
    assert shared["gathered_weight_bytes"] < 0.15 * weights, "two layers of 40, with three experts each"
    assert "of at least 2, got 1" in fails(capsys, "plan", "--shard-weights")
