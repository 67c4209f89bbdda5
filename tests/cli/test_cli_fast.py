"""The command line with fast layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from happyhorse_fast import golden
from happyhorse_fast.budgets import measure
from happyhorse_fast.checkpoint.load import save_checkpoint
from happyhorse_fast.cli import run


def test_sample_runs_fast_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = golden.load_case("dense_v2_fp32")
    save_checkpoint(case.state_dict(), tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps(case.config.to_dict()))
    save_file({k: v for k, v in case.tensors.items() if k.startswith("in.")}, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    paths = [str(tmp_path / "model"), str(tmp_path / "in.safetensors"), str(output)]
    options = ["--config", str(tmp_path / "config.json"), "--device", "cpu", "--seed", str(case.seed), "--json"]
    assert run(["sample", *paths, *options, "--attention", "int8_qk"]) == 2
    assert "--attention must come with --fast, got int8_qk without it" in capsys.readouterr().err
    found = []
    for attention in ("bf16", "int8_qk"):
        assert run(["sample", *paths, *options, "--fast", "bf16", "--attention", attention, "--force"]) == 0
        settings = json.loads(capsys.readouterr().out)["settings"]
        assert (settings["fast"], settings["attention"]) == ("bf16", attention)
        found.append(load_file(output))
        for mode in ("video", "audio"):
            error = measure(found[-1][mode], case.tensors[f"sampler.final.{mode}"].double()).relative_l2
            assert 1e-4 < error < 2e-2, f"measured {error:.2e}"
    assert measure(found[1]["video"], found[0]["video"].double()).relative_l2 > 1e-4
