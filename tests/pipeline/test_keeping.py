"""Latents of a run stay where it fails, and a full disk neither loses them nor ends it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from logged import logs

from happyhorse_fast.pipeline.keeping import Keeper
from happyhorse_fast.pipeline.latents import Latents
from happyhorse_fast.pipeline.request import DENOISED, Request

LATENTS = Latents(
    Request(prompt="x"), DENOISED, *(torch.zeros(1, 1, 1) for _ in range(3)), None, torch.zeros(1).byte(), "cpu"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let these folders be on a full disk."""
    save = Latents.save

    def failing(self: Latents, path: Path) -> None:
        if any(folder in path.parents for folder in folders):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(self, path)

    monkeypatch.setattr(Latents, "save", failing)


def save_in(named: Path | None, target: Path | None, raised: type[BaseException] | None = None) -> None:
    """A run that saves its latents and then fails, or not."""
    with Keeper(named, target) as keeper:
        keeper.save(LATENTS)
        if raised is not None:
            raise raised


def fail_in(target: Path) -> None:
    """A run that fails before there are latents."""
    with Keeper(None, target):
        raise RuntimeError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("beside", [True, False])
def test_what_ends_well_leaves_nothing_and_what_fails_its_latents(tmp_path: Path, beside: bool) -> None:
    target = tmp_path / "x.mp4" if beside else None
    with Keeper(None, target) as keeper:
        keeper.save(LATENTS)
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []
    with (
        logs(r"latents of this run are kept in .*: resume goes on") as said,
        pytest.raises(KeyboardInterrupt),
    ):
        save_in(None, target, KeyboardInterrupt)
    assert len(said) == 1
    assert names(tmp_path) == ["x.latents.safetensors" if beside else "clip.latents.safetensors"]


def test_nothing_is_kept_beside_a_fifo_or_a_device(tmp_path: Path, temporary: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with logs(r"latents of this run are kept in .*: resume goes on"), pytest.raises(KeyboardInterrupt):
        save_in(None, tmp_path / "fifo", KeyboardInterrupt)
    assert names(tmp_path) == names(temporary) == ["clip.latents.safetensors"]


def test_what_was_asked_for_stays(tmp_path: Path) -> None:
    save_in(tmp_path / "y.safetensors", tmp_path / "x.mp4")
    assert names(tmp_path) == ["y.safetensors"]


def test_what_an_earlier_run_left_is_not_written_over(tmp_path: Path) -> None:
    earlier = tmp_path / "x.latents.safetensors"
    earlier.write_text("earlier")
    with Keeper(None, tmp_path / "x.mp4") as keeper:
        keeper.save(LATENTS)
        keeper.save(LATENTS)
        assert names(tmp_path) == ["x.latents-1.safetensors", "x.latents.safetensors"]
    assert names(tmp_path) == ["x.latents.safetensors"] and earlier.read_text() == "earlier"


def test_a_full_disk_sends_them_to_the_temporary_folder(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, tmp_path / "films")
    with logs("latents") as said:
        save_in(tmp_path / "films" / "y.safetensors", None)
    assert "No space left on device" in said[0] and str(temporary) in said[1] and len(said) == 2
    assert names(tmp_path) == ["clip.latents.safetensors"], "they were asked for, so they stay"


@pytest.mark.parametrize("named", [True, False])
def test_where_nothing_can_be_kept_the_run_goes_on(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    full(monkeypatch, tmp_path)
    with logs("latents") as said:
        save_in(tmp_path / "y.safetensors" if named else None, None)
    assert "nor in a temporary folder" in said[1] and "goes on without" in said[1]
    assert list(temporary.iterdir()) == []


def test_what_could_not_be_kept_at_first_is_kept_once_there_is_room(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logs("latents"), Keeper(None, None) as keeper:
        with monkeypatch.context() as patch:
            full(patch, tmp_path)
            keeper.save(LATENTS)
        keeper.save(LATENTS)
        assert names(temporary) == ["clip.latents.safetensors"]


def test_a_run_that_fails_before_there_are_latents_says_nothing(tmp_path: Path) -> None:
    with logs(None), pytest.raises(RuntimeError):
        fail_in(tmp_path / "x.mp4")
    assert names(tmp_path) == []
