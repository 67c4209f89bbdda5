"""Brackets and colons in what is printed are words: paths, messages and help lose nothing to rich's markup."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_checkpoint import CONFIG, weights

import happyhorse_fast as hh
from happyhorse_fast import optional
from happyhorse_fast.cli import run
from happyhorse_fast.cli.output import emit, literal, table, verdict
from happyhorse_fast.golden import draw

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
WORDS = ("[bold]x[/]", "[base]", "[/]", "[red]", ":smile:", r"\[x]", "[link=a]b[/link]", "[1, C, T]")


@pytest.mark.parametrize("words", WORDS)
def test_what_is_printed_is_what_was_said(words: str, capsys: Capture) -> None:
    rows = [[words, literal((words, "green"))], ["a", verdict(True)]]
    emit({}, False, [words, literal(words, (words, "bold")), table(words, [words, words], rows)])
    assert capsys.readouterr().out.count(words) == 8


@pytest.mark.parametrize("words", WORDS)
def test_a_table_is_literal_on_any_console(words: str) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(table(words, [words], [[words]]))
    assert console.file.getvalue().count(words) == 3  # type: ignore[attr-defined]


def test_a_narrow_terminal_cuts_no_number_short(monkeypatch: Patch, capsys: Capture) -> None:
    """rich makes columns that do not fit narrower, 12345.678 to 1…, and then cuts the line."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal: elsewhere there are 120 columns at least
    numbers, why = [f"{n}2345.678" for n in range(1, 9)], "a reason of many words, which may be folded"
    emit({}, False, [table("", ["kind", *("of it",) * 8, "why"], [["sandwich gelu7", *numbers, why]], folded=[9])])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("sandwich gelu7", *numbers, *why.split())) and why not in printed


def test_doctor_names_the_extras_to_install(monkeypatch: Patch, capsys: Capture) -> None:
    why = {
        package: f'needs {package}: pip install "happyhorse-fast[{extra}]"'
        for package, extra in optional.EXTRAS.items()
    }
    monkeypatch.setattr(optional, "obstacle", why.get)
    assert run(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for extra in optional.EXTRAS.values():
        assert f"happyhorse-fast[{extra}]" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--help"], "[on the left|in the middle|on the right]"),
        (["sample", "--help"], "[1, C, 1, H, W]"),
        (["sample", "--help"], "68 120 for 1080p"),
        (["plan", "--preset", "[bold]x[/]"], "got '[bold]x[/]'"),
        (["plan", "--[bold]x"], "--[bold]x"),
    ],
)
def test_help_and_errors_keep_their_brackets(
    arguments: list[str], words: str, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    run(arguments)
    assert words in "".join(capsys.readouterr())


def test_sample_prints_its_paths_and_records_the_clip(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "[bold]"
    folder.mkdir()
    hh.save_checkpoint(weights(), folder / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    text = draw(1, "text", (1, 3, CONFIG.text_in_channels))
    save_file({"text": text, "more [/]": text.clone()}, folder / "in.safetensors")
    given = [str(folder / name) for name in ("model", "in.safetensors", "out.safetensors")]
    how = ["--config", str(folder / "config.json"), "--steps", "1", "--resolution", "256p", "--seconds", "3"]
    assert run(["sample", *given, *how, "--fps", "25", "--aspect", "1:1"]) == 0
    out = capsys.readouterr().out
    assert f"{given[2]}: video" in out and f"not used of {given[1]}: more [/]" in out
    content = Path(given[2]).read_bytes()
    recorded = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    found = {name: json.loads(recorded[name]) for name in ("seconds", "fps", "pixels")}
    assert found == {"seconds": 3, "fps": 25, "pixels": [256, 256]}
    assert (recorded["resolution"], recorded["aspect"]) == ("256p", "1:1")
    # What the noise in a file is of, only who made it knows.
    latents = load_file(given[2])
    save_file({"text": text, **latents}, folder / "in.safetensors")
    assert run(["sample", *given, *how[:4], "--force", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [settings[name] for name in ("resolution", "aspect", "seconds", "fps")] == [None] * 4
    assert settings["pixels"] == [256, 256]
