"""``demo --prompt``: a clip with sound, eager beside fast."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
from safetensors.torch import load_file

from happyhorse_fast.cli import run


def test_a_prompt_becomes_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--prompt", "a large red ball bounces twice", "--out", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    forms = {form["form"]: form for form in data["forms"]}
    assert list(forms) == ["eager float32", "eager bfloat16", "fast bfloat16", "fast fp8"]
    for name in ("eager bfloat16", "fast bfloat16"):
        assert 0 < forms[name]["video_error"] < 5e-2, f"measured {forms[name]}"
        assert forms[name]["psnr_db"] > 45, f"measured {forms[name]}"
    assert forms["fast fp8"]["psnr_db"] > 25, f"measured {forms['fast fp8']}"
    with av.open(data["clip"]) as container:
        assert len(list(container.decode(video=0))) == 49
    assert Path(data["sheet"]).read_bytes()[:4] == b"\x89PNG"
    assert load_file(data["latents"])["fast fp8.video"].shape == (1, 48, 13, 8, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.png", "clip.safetensors"]


def test_a_prompt_outside_the_grammar_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--prompt", "a horse", "--out", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "a horse" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
