"""``verify``: what it measures, that it passes where it should, and that it can fail."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from happyhorse_fast import golden
from happyhorse_fast.checkpoint.load import save_checkpoint
from happyhorse_fast.checkpoint.packed import save_packed
from happyhorse_fast.cli import run
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.verify import checks

torch.set_num_threads(1)

SMALL = ModelConfig.preset("tiny").replace(
    num_layers=3, mm_layers=(0,), local_attn_layers=(1,), hidden_size=160, head_dim=32
)


@pytest.fixture(scope="module")
def verified() -> dict[str, checks.Comparison]:
    return {c.name: c for c in checks.verify_golden()}


@pytest.mark.parametrize("name", golden.names())
def test_every_recorded_case_passes(verified: dict[str, checks.Comparison], name: str) -> None:
    comparison = verified[name]
    worst = comparison.worst()
    assert comparison.skipped is None
    assert comparison.measurements
    assert comparison.passed, f"measured {worst}"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("local_d128_fp32", {"sequence.rope", "layer.0", "layer.2", "out.audio", "sampler.final.video"}),
        ("dense_v2_bf16", {"sequence.tokens", "layer.5", "out.video"}),
        ("sr_v1_fp32", {"sampler.table", "sampler.start.video", "sampler.start.audio", "sampler.step4.video"}),
    ],
)
def test_what_is_measured(verified: dict[str, checks.Comparison], name: str, names: set[str]) -> None:
    assert names <= {m.what for m in verified[name].measurements}


@pytest.mark.parametrize("key", ["block.layers.1.mlp.down_proj.weight", "final_norm_audio.weight"])
def test_a_planted_wrong_weight_is_found(key: str) -> None:
    case = golden.load_case("local_d128_fp32")
    model = case.model()
    with torch.no_grad():
        model.get_parameter(key).view(-1)[:64] *= 1.04
    comparison = checks.verify_case(case, model)
    wrong = {m.what for m in comparison.measurements if not m.passed}
    assert not comparison.passed
    if key.startswith("final_norm_audio"):  # the only thing it reaches: the audio, and through it later steps
        assert "out.audio" in wrong
        assert not wrong & {"layer.0", "layer.1", "layer.2", "out.video", "sampler.step0.video"}
    else:
        assert {"layer.1", "layer.2", "out.video", "out.audio"} <= wrong
        assert "layer.0" not in wrong


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("local_d128_fp32", "tokens"),
        ("local_d128_fp32", "layer.1.out"),
        ("local_d128_fp32", "sampler.final.audio"),
        ("local_d128_fp32", "local.k_ranges"),
        ("sr_v1_fp32", "sr.start.video"),
        ("sr_v1_fp32", "sr.table"),
    ],
)
def test_a_perturbed_record_is_found(name: str, key: str) -> None:
    case = golden.load_case(name)
    tensor = case.tensors[key].clone()
    tensor.view(-1)[len(tensor.view(-1)) // 2] += 2
    comparison = checks.verify_case(dataclasses.replace(case, tensors={**case.tensors, key: tensor}))
    assert [m for m in comparison.measurements if not m.passed], f"{key} was changed and nothing noticed"


def test_a_result_that_is_not_finite_fails() -> None:
    case = golden.load_case("local_d128_bf16")
    tensors = {**case.tensors, "out.video": torch.full_like(case.tensors["out.video"], torch.nan)}
    assert not checks.verify_case(dataclasses.replace(case, tensors=tensors)).passed


def test_without_diffusers_the_second_stage_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    comparison = checks.verify_case(golden.load_case("sr_v1_fp32"))
    assert comparison.measurements == ()
    assert "happyhorse-fast[base]" in str(comparison.skipped)


def test_a_model_at_three_precisions() -> None:
    model = HappyHorse(SMALL, torch.float64).init_weights(0)
    fp32, bf16 = checks.verify_model(model, (3, 2, 4), text=5)
    for comparison, low, high in ((fp32, 1e-8, 1e-5), (bf16, 1e-4, 2e-2)):
        assert len(comparison.measurements) == 2 * (SMALL.num_layers + 1)
        assert comparison.passed, f"measured {comparison.worst()}"
        for m in comparison.measurements:
            assert low < m.error < high, f"measured {m}"
            assert m.cosine == pytest.approx(1, abs=high)


def test_a_precision_that_loses_too_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = checks.in_dtype

    def careless(model: HappyHorse, dtype: torch.dtype) -> HappyHorse:
        other = as_it_is(model, dtype)
        if dtype == torch.bfloat16:  # not shared: the float64 model keeps its own
            weight = other.block.layers[2].mlp.down_proj.weight
            other.block.layers[2].mlp.down_proj.weight = torch.nn.Parameter(weight.detach() * 1.1)
        return other

    monkeypatch.setattr(checks, "in_dtype", careless)
    fp32, bf16 = checks.verify_model(HappyHorse(SMALL).init_weights(0), (2, 2, 2))
    assert fp32.passed
    wrong = {m.what for m in bf16.measurements if not m.passed}
    assert {"layer.2.video", "layer.2.audio"} <= wrong
    assert not wrong & {"layer.0.video", "layer.1.video"}


def test_the_command_without_a_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verified: dict[str, checks.Comparison]
) -> None:
    monkeypatch.setattr(checks, "verify_golden", lambda: list(verified.values()))
    assert run(["verify", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert [case["name"] for case in data["cases"]] == golden.names()
    assert {"dtype", "passed", "skipped", "worst", "measurements"} <= data["cases"][0].keys()
    assert run(["verify"]) == 0
    assert capsys.readouterr().out.count("pass") == len(golden.names())


def test_the_command_fails_past_a_budget(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = checks.Comparison("planted", "float32", (checks.Measurement("out.video", 2e-5, 1e-5),))
    monkeypatch.setattr(checks, "verify_golden", lambda: [broken])
    assert run(["verify"]) == 1
    assert "planted: out.video is off by 2.00e-05, budget 1e-05" in capsys.readouterr().out
    assert run(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_the_command_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(HappyHorse(SMALL).init_weights(1), tmp_path / "model")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL.to_dict()))
    arguments = ["verify", str(tmp_path / "model"), "--config", str(config), "--grid", "2", "2", "2", "--device", "cpu"]
    assert run([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [case["dtype"] for case in data["cases"]] == ["float32", "bfloat16"]
    assert {m["what"] for m in data["cases"][0]["measurements"]} >= {"layer.2.audio", "out.video"}
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 - cosine" in shown and "sampler" not in shown
    assert "(layer.2.video)" in shown or "(layer.2.audio)" in shown, "not cut off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny"], "--preset must come with a checkpoint, got none"),
        (["--top-k", "0.25"], "--top-k must come with --fast"),
        (["--attention", "fp8"], "--attention must come with --fast"),
        (["--fast", "--quick"], "--quick must come with --pony"),
        (["--device", "cuda"], "--device must be left out, got 'cuda': the recorded cases"),
        (["--kernels", "--device", "xpu"], "device must be one that this machine has, got 'xpu'"),
        (["nowhere", "--preset", "tiny"], "nowhere"),
        (["nowhere"], "exactly one of preset and config is required"),
        (["--grid", "1", "2"], "grid"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--grid=0 1 1", "--text=0", f"--seed={2**32}"])
def test_a_checkpoints_inputs_are_held_before_it_is_loaded(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("happyhorse_fast.checkpoint.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert run(["verify", str(tmp_path), "--preset", "tiny", *option.replace("=", " ").split()]) == 2
    assert option[2:].partition("=")[0] in capsys.readouterr().err


def test_packed_weights_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_packed(accelerate(HappyHorse(SMALL).init_weights(1), FastConfig(backend="reference")), tmp_path / "packed")
    for more in ([], ["--fast"]):
        assert run(["verify", str(tmp_path / "packed"), "--device", "cpu", *more]) == 2
        assert "packed holds packed ones" in capsys.readouterr().err
