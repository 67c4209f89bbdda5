"""Where results go: regular files are replaced whole, links are followed, FIFOs and devices are written into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load, load_file
from toy_checkpoint import CONFIG, weights

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint.load import load as load_checkpoint
from happyhorse_fast.checkpoint.load import save_checkpoint
from happyhorse_fast.cli import run
from happyhorse_fast.cli.output import save_tensors
from happyhorse_fast.files import is_special, replacing, require_folder, require_target
from happyhorse_fast.pony.media import read_image

TENSORS = {"video": torch.arange(6.0)}


def save(path: Path, *, force: bool = False) -> None:
    """As a command does: checked before the work, written after it."""
    require_target(path, force)
    save_tensors(path, TENSORS, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_regular_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(FileExistsError, match="--force replaces it"):
        save(path)
    save(path, force=True)
    assert load_file(path)["video"].equal(TENSORS["video"])
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("name", ["x" * 251 + ".mp4", "\u99ac" * 83 + ".mp4"])
def test_a_name_as_long_as_a_disk_takes_is_written(name: str, tmp_path: Path) -> None:
    require_target(tmp_path / name, force=False)
    with replacing(tmp_path / name, end=".mp4") as partial:
        partial.write_text("content")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_its_target_is_written(there: bool, relative: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target.safetensors", tmp_path / "link.safetensors"
    between = tmp_path / "between"
    between.symlink_to("far/target.safetensors" if relative else target)
    link.symlink_to("between" if relative else between)
    if there:
        target.write_text("old")
        with pytest.raises(FileExistsError, match="--force"):
            save(link)
    save(link, force=there)
    assert link.is_symlink() and between.is_symlink() and not target.is_symlink()
    assert load_file(target)["video"].equal(TENSORS["video"])
    assert names(tmp_path / "far") == ["target.safetensors"]


def test_two_may_look_at_a_folder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another one, which has the same number in another container, has taken the probe away.
    monkeypatch.setattr(Path, "touch", lambda self: None)
    require_target(tmp_path / "x", force=False)


@pytest.mark.parametrize("lead", ["nowhere/target", "link"])
def test_a_link_that_leads_nowhere_is_named_before_the_work(lead: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / lead)
    with pytest.raises(OSError, match="link"):
        require_target(link, force=True)
    assert link.is_symlink()


def test_an_error_leaves_a_link_and_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)

    def write_half() -> None:
        with replacing(link) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old" and names(tmp_path) == ["link", "target"]


def test_a_fifo_gets_the_content(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    save(fifo)
    reader.join(timeout=30)
    assert load(found[0])["video"].equal(TENSORS["video"])
    assert is_special(fifo) and names(tmp_path) == ["fifo"]


def test_a_device_gets_the_content_also_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        save(path)
        assert is_special(path) and Path("/dev/null").is_char_device()
    assert link.is_symlink() and not list(Path("/dev").glob(".null*"))


def test_what_a_device_does_not_take_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(OSError, match="/dev/full cannot be written: No space left on device; the content is left in"):
        save(Path("/dev/full"))
    (left,) = tmp_path.rglob("content*")
    assert load(left.read_bytes())["video"].equal(TENSORS["video"])


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_gets_the_content(name: str, piped: bool, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from happyhorse_fast.files import replacing, require_target
require_target(Path({name!r}), force=False)
with replacing(Path({name!r})) as partial:
    partial.write_text("content")
"""
    file = tmp_path / "out"
    with file.open("wb") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE if piped else out, check=True)
    assert (done.stdout if piped else file.read_bytes()) == b"content"
    assert names(tmp_path) == ["out"]


def test_a_checkpoint_goes_through_a_link_to_a_folder(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("deep/folder")
    save_checkpoint(TENSORS, link)
    assert link.is_symlink() and names(tmp_path / "deep" / "folder") == ["model.safetensors"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_checkpoint(TENSORS, link)
    save_checkpoint({"video": torch.zeros(2)}, link, overwrite=True)
    assert link.is_symlink() and load_file(link / "model.safetensors")["video"].shape == (2,)
    assert names(tmp_path / "deep") == ["folder"]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_checkpoint_replaces_no_fifo_and_no_folder(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "model.safetensors"
    os.mkfifo(there) if kind == "fifo" else there.mkdir()
    with pytest.raises(FileExistsError, match=r"model\.safetensors is no regular file"):
        save_checkpoint(TENSORS, tmp_path, overwrite=True)
    assert names(tmp_path) == ["model.safetensors"] and not there.is_file()


def test_a_checkpoint_takes_nothing_from_a_shared_cache(tmp_path: Path) -> None:
    blob, folder = tmp_path / "blob", tmp_path / "snapshot"
    blob.write_text("shared")
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    save_checkpoint(TENSORS, folder, overwrite=True)
    assert blob.read_text() == "shared" and load_file(folder / "model.safetensors").keys() == {"video"}


def test_a_folder_behind_a_link_is_checked_where_it_will_be(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new" / "folder")
    require_folder(link)
    (tmp_path / "new").write_text("a file")
    with pytest.raises(OSError, match="is a file"):
        require_folder(link)


# What is read --------------------------------------------------------------------------------------------------------


def fed(path: Path, content: bytes) -> threading.Thread:
    """A FIFO, and a thread that writes once to it."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    return writer


def test_sample_reads_its_inputs_and_configuration_from_fifos(tmp_path: Path) -> None:
    """As a shell's <(...) gives them: once."""
    save_checkpoint(weights(), tmp_path / "model")
    text = {"text": torch.ones(1, 3, CONFIG.text_in_channels)}
    inputs, config = tmp_path / "inputs", tmp_path / "config"
    writers = fed(inputs, safetensors.torch.save(text)), fed(config, json.dumps(CONFIG.to_dict()).encode())
    given = [str(tmp_path / "model"), str(inputs), str(tmp_path / "out"), "--config", str(config)]
    assert run(["sample", *given, "--steps", "1", "--resolution", "256p", "--seconds", "3", "--json"]) == 0
    for writer in writers:
        writer.join(timeout=30)
    assert load_file(tmp_path / "out").keys() == {"video", "audio"}


def test_a_picture_is_read_from_a_fifo(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((8, 8, 3), 51, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    fed(tmp_path / "fifo", (tmp_path / "a.png").read_bytes())
    assert read_image(tmp_path / "fifo").allclose(torch.tensor(0.2))


def test_a_checkpoint_is_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        load_checkpoint(tmp_path / "model.safetensors", config=CONFIG)
