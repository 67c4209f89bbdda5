"""Whole runs over two processes: the same noise, the same clip as one process, written once."""

import json
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_work import both_stages, command, config_of, model_of, sampled, sampled_by
from safetensors.numpy import load_file
from safetensors.torch import save_file
from small_models import clip
from torch.distributed import device_mesh

import happyhorse_fast as hh
from happyhorse_fast.cli import run
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.parallel.launched import Launched

REFERENCE = FastConfig(backend="reference")


@pytest.mark.quick(4)
@pytest.mark.parametrize("noise", ["global", "generator", "named"])
@pytest.mark.parametrize("image", [False, True])
def test_ranks_sample_the_clip_of_rank_0(two, noise, image):
    alone = sampled_by(model_of(config_of(2), REFERENCE), 0, noise, image)
    for latents in two(sampled, 2, REFERENCE, noise, image):
        assert all(map(np.array_equal, latents, alone))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_more_ranks_make_both_stages_of_a_picture(many, precision):
    results = many(both_stages, many.ranks, FastConfig(precision=precision, backend="reference"))
    for latents, _ in results:
        assert all(map(np.array_equal, latents, results[0][1]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = config_of(2, coords_style="v1")
    hh.save_checkpoint(model_of(config, None), folder / "model")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    video, audio, text = clip(3, 16, 9, 4)
    save_file({"video": video, "audio": audio, "text": text}, folder / "inputs.safetensors")
    return folder


def arguments(folder, output, *more):
    model, config = folder / "model", folder / "config.json"
    said = ["sample", model, folder / "inputs.safetensors", output, "--config", config, "--device", "cpu", "--json"]
    return [*map(str, [*said, "--steps", 2, *more])]


def test_both_stages_under_torchrun_give_one_file(two, checkpoint, tmp_path, capsys):
    config = checkpoint / "config.json"
    more = ["--fast", "fp8", "--sr-checkpoint", checkpoint / "model", "--sr-config", config, "--size", 4, 40]
    assert run(arguments(checkpoint, tmp_path / "alone.safetensors", *more, "--sr-steps", 2)) == 0
    capsys.readouterr()
    more.append("--shard-weights")
    results = two(command, 2, arguments(checkpoint, tmp_path / "two.safetensors", *more, "--sr-steps", 2))
    assert [result[0] for result in results] == [0, 0], results
    assert json.loads(results[0][1])["settings"]["ranks"] == 2
    assert results[1][1] == ""
    alone, together = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "two"))
    assert alone.keys() == together.keys()
    assert all(np.array_equal(alone[key], together[key]) for key in alone)


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [False, True])
def test_torchrun_itself(checkpoint, tmp_path, culprit):
    said = arguments(checkpoint, tmp_path / "out.safetensors")
    if culprit:  # the second process has another configuration
        config = json.loads((checkpoint / "config.json").read_text()) | {"frame_receptive_field": 7}
        (tmp_path / "other.json").write_text(json.dumps(config))
        said[said.index("--config") + 1] = "$CONFIG"
    program = (
        "import os, sys; from happyhorse_fast.cli import run;"
        f"paths = {[str(checkpoint / 'config.json'), str(tmp_path / 'other.json')]};"
        "sys.exit(run([paths[int(os.environ['RANK'])] if x == '$CONFIG' else x for x in sys.argv[1:]]))"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script), *said], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode != 0) == culprit, done.stderr
    assert (tmp_path / "out.safetensors").exists() != culprit
    if culprit:
        assert "config.frame_receptive_field must be the same on all 2 ranks" in done.stderr


def test_weights_of_one_process_are_not_shared(checkpoint, tmp_path, capsys):
    assert run(arguments(checkpoint, tmp_path / "out.safetensors", "--shard-weights")) == 2
    assert (
        "--shard-weights must come with several processes, which torchrun starts; this is one"
        in capsys.readouterr().err
    )


def test_a_number_of_processes_that_cannot_share_the_heads(two, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(arguments(checkpoint, tmp_path / "out.safetensors")) == 2
    assert "a number of ranks that divides the 2 key/value heads (1, 2), got 3" in capsys.readouterr().err


def test_what_torchrun_says(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launched.here() == Launched()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="must be numbers, got RANK=3, LOCAL_RANK=None, WORLD_SIZE=4"):
        Launched.here()
    monkeypatch.setenv("LOCAL_RANK", "1")
    process = Launched.here()
    assert (process.device("cuda"), process.device("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(ValueError, match="device must be auto, cuda or cpu where torchrun starts 4 processes"):
        process.device("cuda:0")


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_failed_run_left_on_its_way_over_nccl_is_aborted(monkeypatch, fails):
    # To destroy a group is to wait for its collectives, of a rank that is gone for ever.
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: done[-1:] == ["made"])
    monkeypatch.setattr(dist, "init_process_group", lambda backend: done.append("made"))
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda kind, shape: (kind, shape))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    with pytest.raises(KeyError) if fails else nullcontext(), Launched(1, 1, 2).mesh("cuda:1") as mesh:
        assert mesh == ("cuda", (2,))
        if fails:
            raise KeyError
    assert done == ["made", "aborted" if fails else "destroyed"]
