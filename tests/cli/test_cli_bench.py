"""`happyhorse-fast bench`: every form and op of a small clip, its numbers, and what it refuses."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from happyhorse_fast.cli import run
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.fast.memory import one_layer_per_kind
from happyhorse_fast.json_data import plain
from happyhorse_fast.ops.runtime.dispatch import STEMS
from happyhorse_fast.tokens import ClipTokens
from happyhorse_fast.verify import op_times
from happyhorse_fast.verify.op_times import OpTimes, group_of, time_forms

CLIP, CPU = ClipTokens(3, 16, 16, 9), torch.device("cpu")
LAYERS = one_layer_per_kind(ModelConfig.preset("tiny"), CLIP)
USED = set(STEMS) - {"select_blocks", "fp8_linear", "quantize_rows"}


@pytest.fixture(scope="module")
def data():
    return {"forms": plain(time_forms(LAYERS, CLIP, text=8, repeats=2, device=CPU)), "layers": LAYERS.num_layers}


def test_every_op_of_every_form_is_timed(data):
    forms = {form["form"]: form for form in data["forms"]}
    assert set(forms) == {"eager bfloat16", "fast bfloat16", "fast int8", "fast fp8"}
    assert [form["attention"] for form in data["forms"]] == [None, "bf16", "int8_qk", "int8_qk"]
    for name in ("fast bfloat16", "fast int8", "fast fp8"):
        ops = {op["op"]: op for op in forms[name]["ops"]}
        assert set(ops) >= USED | ({"quantize_rows"} if name == "fast int8" else set())
        assert ops["qkv_linear"]["calls"] == data["layers"]
        assert ops["fp8_linear_residual"]["calls"] == 2 * data["layers"]
        assert ops["qkv_linear"]["backend"] == "reference" and ops["products"]["tflops"] is None
        assert forms[name]["ms"] == pytest.approx(sum(op["ms"] for op in ops.values()), rel=0.5)
    assert all(op["ms"] >= 0 for form in forms.values() for op in form["ops"])


def test_attention_of_the_fast_forms_is_what_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(op_times, "time_form", lambda form, config, clip, text, *how: asked.append(how[:2]))
    time_forms(LAYERS, CLIP, text=8, repeats=2, device=CPU, attention="int8_qk")
    assert set(asked) == {("int8_qk", 2)}
    asked.clear()
    with pytest.raises(
        ValueError, match="attention must be one of bf16, int8_qk, int8_qk_fp8_v, fp8; got 'fp8_qk'; int8_qk is in its"
    ):
        time_forms(LAYERS, CLIP, text=8, repeats=1, device=CPU, attention="fp8_qk")
    assert not asked, "eager passes were timed before"


def test_eager_products_hold_attention_where_there_is_no_fused_kernel(data):
    eager = {op["op"]: op for op in data["forms"][0]["ops"]}
    assert "attention" not in eager and eager["products"]["tflops"] > 0


def test_both_outputs(monkeypatch, capsys):
    found = time_forms(LAYERS, CLIP, text=8, repeats=1, device=CPU)
    monkeypatch.setattr(op_times, "time_forms", lambda *_, **__: found)
    assert run(["bench", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forms"][0]["form"] == "eager bfloat16"
    assert run(["bench"]) == 0
    assert "block_sparse_attention" in capsys.readouterr().out


def test_forms_are_named_before_their_time_is_taken(monkeypatch, capsys):
    """All four take a minute and a half of two cores."""
    monkeypatch.setattr(op_times, "time_form", lambda form, *_: op_times.FormTimes(form.name, None, 1.0, [], []))
    assert run(["bench", "--device", "cpu"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [f"timing {form.name}..." for form in op_times.FORMS if form.precision != "fp32"]


def test_events_are_of_the_gpu_that_is_asked_for(monkeypatch):
    on = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(op_times, "time_form", lambda *_: on.timed())
    time_forms(None, None, text=1, repeats=1, device=torch.device("cuda:1"))
    calls = [name for name, *_ in on.mock_calls]
    assert on.mock_calls[0] == mock.call(torch.device("cuda:1"))
    assert calls[1:3] == ["().__enter__", "timed"] and calls[-1] == "().__exit__"


def test_bad_input_is_one_line(capsys):
    for option in ("repeats", "text"):
        assert run(["bench", f"--{option}", "-4"]) == 2
        assert f"{option} must be at least 1, got -4" in capsys.readouterr().err


def test_what_an_operation_counts_as():
    for backend in ("", "_reference", "_cuda"):
        assert group_of(f"happyhorse_fast::qkv_linear{backend}") == "qkv_linear"
    assert group_of("aten::addmm") == "products"
    assert group_of("aten::_scaled_dot_product_flash_attention") == "attention"
    assert group_of("aten::mul") == "other"
    with OpTimes(torch.device("cpu")) as times:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert times.calls()["products"] == 1 and times.seconds()["products"] > 0


@pytest.mark.parametrize("device", ["xpu", "cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--device", device]) == 2
    assert f"device must be one that this machine has, got '{device}'" in capsys.readouterr().err
