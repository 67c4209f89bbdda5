"""``verify --calibrate``: that it names the op that 8 bits break and no other, and what its file is taken for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from happyhorse_fast.budgets import measure
from happyhorse_fast.checkpoint.load import save_checkpoint
from happyhorse_fast.cli import run
from happyhorse_fast.config import OPS, ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.calibration import ATTENTION, MOST, Calibration, OpCalibration, skip_rules
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.state import build_clip_state
from happyhorse_fast.verify import calibration
from happyhorse_fast.verify.checks import in_dtype, seeded_inputs
from happyhorse_fast.verify.layer_ops import FastOps, eager_ops, record_inputs

torch.set_num_threads(1)

SMALL = ModelConfig.preset("tiny").replace(
    num_layers=3, mm_layers=(0,), local_attn_layers=(1,), hidden_size=160, head_dim=32
)
CLIP: dict[str, Any] = {"grid": (2, 4, 4), "text": 32}
BAD = 1
"""The planted layer."""


def healthy(seed: int = 0) -> HappyHorse:
    return HappyHorse(SMALL, torch.float32).init_weights(seed)


@torch.no_grad()
def down_outliers() -> HappyHorse:
    """48 channels of down's input are 1e4 times smaller and their weights 1e4 times larger."""
    model = healthy()
    mlp = model.block.layers[BAD].mlp
    mlp.up_gate_proj.weight[0:96:2] *= 1e-4  # the gates: SwiGLU7 is linear in a gate near 0
    mlp.down_proj.weight[:, :48] *= 1e4
    return model


@torch.no_grad()
def k_outlier() -> HappyHorse:
    """One channel of k is 256 times the others', and q's as much smaller: the scores are what they would be."""
    model = healthy()
    attention = model.block.layers[BAD].attention
    attention.k_norm.weight[-1], attention.q_norm.weight[-1] = 2**8 - 1, 2**-8 - 1
    return model


def calibrated(model: HappyHorse, clips: int = 1, **options: Any) -> Calibration:
    quiet: dict[str, Any] = {"report": lambda line: None, "progress": False}
    return calibration.calibrate(model, clips, **quiet | {"steps": 1} | CLIP | options)


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrated(down_outliers(), steps=2)


def test_what_is_measured(found: Calibration) -> None:
    assert [(of.layer, of.op) for of in found.ops] == [(layer, op) for layer in range(3) for op in OPS]
    for of in found.ops:
        assert of.errors.keys() == {"bf16", "int8", "fp8"}
        assert all(errors.keys() == {"video", "audio", "text"} for errors in of.errors.values())
        assert (of.bound is not None and 10 < of.bound < 40) == (of.op == "attention")
        assert [*of.inputs] == (["q", "k", "v"] if of.op == "attention" else [f"{of.op} input"])
        if (of.layer, of.op) == (BAD, "down"):
            assert of.worst("int8") > 1 and of.worst("fp8") > 0.1 and of.inputs["down input"].lost > 0.01
        else:
            # docs/OPS.md: int8 about 1 %, e4m3 sqrt(2) x 2.65 % for a product of two, more through SwiGLU7's own.
            assert of.worst("bf16") < 5e-3 < of.worst("int8") < 2e-2 < of.worst("fp8") < 6e-2, of
        for name, seen in of.inputs.items():
            assert seen.largest > 2 * seen.rms > 0 and seen.saturated == 0, name
    assert found.most == MOST and not found.coarse


@torch.no_grad()
def test_the_bound_is_that_of_both_formats() -> None:
    for seed in range(50):  # until each format has the larger one in a layer; the draw is another torch's own
        model = healthy(seed)
        for layer in model.block.layers:
            layer.attention.pre_norm.weight.fill_(1e14)  # v counts from 2^63 on
        packed = [
            accelerate(in_dtype(model, torch.bfloat16), FastConfig(precision=p, backend="reference")) for p in ATTENTION
        ]
        both = [[layer.bound.effective for layer in one.block.layers] for one in packed]  # type: ignore[union-attr]
        if {a > b for a, b in zip(*both, strict=True)} == {True, False}:
            break
    else:
        pytest.fail("no draw tells the formats apart")
    bounds = [of.bound for of in calibrated(model).ops if of.op == "attention"]
    assert bounds == [max(of) for of in zip(*both, strict=True)]


@pytest.mark.parametrize(
    ("make", "int8", "fp8"),
    [(healthy, [], []), (down_outliers, ["down:1"], ["down:1"]), (k_outlier, ["attention:1"], [])],
)
def test_the_planted_op_is_named_and_no_other(
    make: Callable[[], HappyHorse], int8: list[str], fp8: list[str], found: Calibration
) -> None:
    # One large channel is no outlier to e4m3, which is floating point: its static scale leaves the others 2^-8 of 448.
    result = found if make is down_outliers else calibrated(make())
    assert result.skip == {"int8": int8, "fp8": fp8}


def test_errors_and_ranges_are_the_largest_of_all_clips_and_steps() -> None:
    model = healthy()
    one, two = calibrated(model), calibrated(model, clips=2)
    other = calibrated(model, seed=1)
    for a, b, both in zip(one.ops, other.ops, two.ops, strict=True):
        for precision, errors in both.errors.items():
            wanted = {m: max(a.errors[precision][m], b.errors[precision][m]) for m in errors}
            assert errors == wanted
        for name, seen in both.inputs.items():
            assert seen.largest == max(a.inputs[name].largest, b.inputs[name].largest)
    assert [of.errors for of in one.ops] != [of.errors for of in other.ops]


def test_planted_saturation_and_loss_show() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (100, 1000, 1e-3):
        sums = calibration.Sums()
        sums.add(x[:256], scale * x[:256])
        sums.add(x[256:], scale * x[256:])
        found.append(sums.result())
    fits, past, lost = found
    assert fits.largest == x.abs().max() and fits.rms == pytest.approx(1, abs=0.01)
    assert (fits.saturated, past.lost) == (0, 0) and fits.lost < 1e-3
    assert past.saturated > 0.5 and lost.lost > 0.5


def test_the_model_is_left_as_it_is() -> None:
    model = healthy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines: list[str] = []
    calibrated(model, report=lines.append)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.block.layers)
    assert lines == ["calibrate: clip 1 of 1"]
    with pytest.raises(ValueError, match="it is accelerated"):
        calibrated(accelerate(model, FastConfig(backend="reference")))


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_op_is_not_charged_for_the_format_of_the_next(precision: Any) -> None:
    model, inputs = healthy(), seeded_inputs(SMALL, (2, 2, 2), text=5, seed=0, device=torch.device("cpu"))
    given = record_inputs(model, inputs)[BAD]
    layer = model.block.layers[BAD]
    exact = eager_ops(layer, given, torch.float32)
    results = {}
    for skip in ([], ["proj", "down"]):
        fast = FastConfig(precision=precision, attention="bf16", backend="reference", skip=skip)
        accelerated: Any = accelerate(in_dtype(model, torch.bfloat16), fast)
        state = build_clip_state(accelerated.fast, given.clip, model.adapter.rope.bands)
        packed = accelerated.block.layers[BAD]
        fast_ops = FastOps(packed, state, given, exact)
        results[len(skip)] = fast_ops.results()
        if not skip:
            alone = dict(fast_ops.products())
    for op, skipped in (("qkv", 0), ("proj", 0), ("down", 0), ("up", 2)):
        assert torch.equal(alone[op].float(), results[skipped].of(op)), op


def entry(layer: int, op: str, int8: float) -> OpCalibration:
    errors = {p: {"video": 0.0, "audio": value, "text": 0.0} for p, value in (("bf16", 0.0), ("int8", int8))}
    return OpCalibration(layer, op, {}, errors)


def test_spans_are_merged() -> None:
    bad = {0, 1, 2, 3, 36, 38, 39}
    ops = [entry(layer, "down", 0.2 if layer in bad else 0.01) for layer in range(40)]
    ops += [entry(4, "qkv", float("inf")), entry(5, "qkv", 0.051), entry(6, "qkv", 0.05)]
    assert skip_rules(ops, "int8", 0.05) == ["qkv:4-5", "down:0-3,36,38-39"]


def test_what_is_not_finite_is_past_every_bound() -> None:
    ones, bad = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    assert calibration.error_of(ones, bad) == calibration.error_of(bad, ones) == float("inf")
    assert calibration.error_of(ones * 1.5, ones) == 0.5


# The file, and what loads it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(found: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    # Attention of another layer too, so that which list it comes from shows.
    skip = {"int8": ["attention:0", *found.skip["int8"]], "fp8": ["attention:2", *found.skip["fp8"]]}
    calibration.write(dataclasses.replace(found, skip=skip), path)
    return path


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_accelerated_model_is_close_again(precision: Any, file: Path) -> None:
    model = down_outliers()
    inputs = seeded_inputs(SMALL, (2, 2, 2), text=5, seed=0, device=torch.device("cpu"))

    @torch.no_grad()
    def error(fast: FastConfig) -> float:
        ours = accelerate(in_dtype(model, torch.bfloat16), fast)(*inputs)
        pairs = zip(ours, in_dtype(model, torch.float32)(*inputs), strict=True)
        return max(measure(x[0].flatten(1), y[0].flatten(1)).relative_l2 for x, y in pairs)

    plain = FastConfig(precision=precision, backend="reference")
    careful = FastConfig.calibrated(file, SMALL, precision=precision, backend="reference")
    assert error(careful) < MOST[precision] < error(plain)


def test_which_rules_are_taken(file: Path) -> None:
    def of(**options: Any) -> tuple[Any, ...]:
        return tuple(FastConfig.calibrated(file, SMALL, **options).skip)

    assert of(precision="int8") == ("down:1", "attention:0")
    assert of(precision="int8", attention="bf16") == ("down:1",)
    assert of(precision="fp8") == ("down:1", "attention:0")  # attention is in int8_qk beside it
    assert of(precision="fp8", attention="fp8") == ("down:1", "attention:2")
    assert of(precision="fp8", attention="int8_qk_fp8_v") == ("down:1", "attention:2")
    assert of(attention="int8_qk") == ("attention:0",)
    assert of(precision="int8", skip=["up:0"], mlp_rows=256) == ("up:0", "down:1", "attention:0")
    with pytest.raises(ValueError, match="precision or attention must be of 8 bits to be calibrated"):
        of()
    with pytest.raises(ValueError, match=r"^skip must name layers from 0 to 2, got 'up:9'"):  # not the file's
        of(precision="int8", skip=["up:9"])
    with pytest.raises(TypeError, match="config must be a ModelConfig, got str"):
        FastConfig.calibrated(file, "tiny", precision="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: "{", "not a calibration"),
        (lambda data: [1], "it has no skip and config"),
        (lambda data: data | {"format": 2}, "its format is 2, this version reads 1"),
        (lambda data: data | {"config": {"num_layers": 3}}, "not a calibration"),
        (lambda data: data | {"skip": {"int8": []}}, "skip must have int8, fp8"),
        (lambda data: data | {"skip": {"int8": [3], "fp8": []}}, "skip must hold rules"),
        (lambda data: data | {"skip": {"int8": ["downs:0"], "fp8": []}}, "got 'downs:0'"),
        (lambda data: data | {"skip": {"int8": ["down:7"], "fp8": []}}, "layers from 0 to 2, got 'down:7'"),
        (lambda data: data | {"config": data["config"] | {"hidden_size": 320}}, "it has hidden_size 320, not 160$"),
    ],
)
def test_a_bad_file_is_refused_by_name(change: Callable[[Any], Any], says: str, file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    content = change(json.loads(file.read_text()))
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says) as error:
        FastConfig.calibrated(bad, SMALL, precision="int8")
    assert str(error.value).startswith(f"{bad}: ")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FastConfig.calibrated(tmp_path / "nowhere", SMALL, precision="int8")


# The command ----------------------------------------------------------------------------------------------------------


def command(folder: Path, model: HappyHorse, *more: str) -> list[str]:
    save_checkpoint(model, folder / "model")
    (folder / "config.json").write_text(json.dumps(SMALL.to_dict()))
    given = ["--config", str(folder / "config.json"), "--device", "cpu", "--grid", "2", "2", "2", "--text", "5"]
    return ["verify", str(folder / "model"), *given, "--calibrate", "1", "--steps", "1", *more]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = command(tmp_path, down_outliers(), "--out", str(out))
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("layer 1 down", "skip in int8 (past 0.05): down:1", "skip in fp8 (past 0.1): down:1", "Written"):
        assert words in shown
    assert FastConfig.calibrated(out, SMALL, precision="fp8").skip == ("down:1",)
    assert run(arguments) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert run([*arguments, "--force", "--json", "--most", "0.02"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] and "cases" not in data
    assert data["calibration"] == json.loads(out.read_text())
    assert data["calibration"]["skip"]["fp8"] == ["qkv:0-2", "attention:0-2", "proj:0-2", "up:0-2", "down:0-2"]
    assert data["calibration"]["checkpoint"] == str(tmp_path / "model")


def test_what_bf16_itself_loses_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert run(command(tmp_path, healthy(), "--out", str(out), "--most", "0.003")) == 1
    assert "up of layer 2 is off by" in capsys.readouterr().out
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibrate", "1"], "--calibrate must come with a checkpoint, got none"),
        (["--out", "x.json"], "--out must come with --calibrate, got none"),
        (["--most", "0.1"], "--most must come with --calibrate, got none"),
        (["--steps", "2"], "--steps must come with --fast or --calibrate, got none"),
        (["nowhere", "--calibrate", "0"], "calibrate must be at least 1, got 0"),
        (["nowhere", "--calibrate", "1", "--steps", "0"], "steps must be at least 1, got 0"),
        (["nowhere", "--calibrate", "1", "--most", "0"], "most must be above 0 and at most 1, got 0"),
        (["nowhere", "--calibrate", "1", "--out", "nowhere/x.json"], "output must be in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
