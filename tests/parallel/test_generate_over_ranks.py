"""From a prompt to an mp4 over two processes: one file, of the same bytes as one process's."""

import json

import numpy as np
import pytest
from rank_work import clips_of_a_pipeline, generated
from safetensors.numpy import load_file
from sound_files import write_sine

import happyhorse_fast as hh
from happyhorse_fast.pipeline.tiny import write_tiny_checkpoint

SIDES = {"256p": (64, 96), "540p": (96, 160), "1080p": (128, 192)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def sound(tmp_path):
    return write_sine(tmp_path / "sound.wav", 44100)


def arguments(tiny, folder, *more):
    folder.mkdir(exist_ok=True)
    sizes = ["--seconds", 3, "--resolution", "540p", "--device", "cpu", "--precision", "bf16", "--json"]
    files = ["--out", folder / "clip.mp4", "--latents", folder / "clip.safetensors"]
    return [*map(str, ["generate", "a ball", "--model", tiny, *sizes, *files, *more])]


def test_what_makes_no_pipeline_of_several_ranks():
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh, .*; got int"):
        hh.Pipeline.from_pretrained("nowhere", mesh=2)
    with pytest.raises(ValueError, match="shard_weights must come with mesh, got mesh=None"):
        hh.Pipeline.from_pretrained("nowhere", shard_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["sequential", "resident"])
def test_two_ranks_make_the_mp4_of_one(two, tiny, sound, tmp_path, placement):
    one, both = tmp_path / "one", tmp_path / "both"
    said, where = ["--audio", sound, "--placement", placement], (SIDES, str(tmp_path / "cache"))
    assert generated(0, 1, arguments(tiny, one, *said), *where)[0] == 0
    sharded = ["--shard-weights"] if placement == "sequential" else []
    results = two(generated, 2, arguments(tiny, both, *said, *sharded), *where)
    assert [result[0] for result in results] == [0, 0], results
    assert json.loads(results[0][1])["ranks"] == 2
    assert results[1][1] == "", "rank 0 alone reports"
    alone, together = (load_file(folder / "clip.safetensors") for folder in (one, both))
    assert all(np.array_equal(alone[key], together[key]) for key in alone)
    assert (one / "clip.mp4").read_bytes() == (both / "clip.mp4").read_bytes()


@pytest.mark.slow
def test_what_rank_0_finds_wrong_ends_the_others(two, tiny, tmp_path):
    tmp_path.joinpath("clip.mp4").touch()
    results = two(generated, 2, arguments(tiny, tmp_path), SIDES, str(tmp_path / "cache"))
    assert [result[0] for result in results] == [2, 1]
    assert "rank 0 failed: FileExistsError: " in results[1][2]


@pytest.mark.slow
def test_a_pipeline_makes_clip_after_clip(two, tiny):
    first, second = two(clips_of_a_pipeline, 2, str(tiny), SIDES)[0]
    assert np.array_equal(first, second) and first.std() > 0
