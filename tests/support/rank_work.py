"""What the ranks of a :mod:`rank_pool` run; importable by them without pytest."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import time
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from small_models import CONFIG, PublicLayout, clip, packed
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import happyhorse_fast as hh
from happyhorse_fast import golden, tokens
from happyhorse_fast.checkpoint import load
from happyhorse_fast.checkpoint.header import PACKED_FILE
from happyhorse_fast.cli import run
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.memory import sharded_bytes
from happyhorse_fast.fast.parallelize import ranks_of, spread
from happyhorse_fast.parallel import faults
from happyhorse_fast.pipeline import company, residency


def local(x: Any) -> torch.Tensor:
    """What this rank holds of a tensor, sharded (a DTensor) or whole."""
    part: torch.Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of weights that this rank holds."""
    return sum(local(x).nbytes for x in tensors)


def config_of(heads: int = 2, **changes: Any) -> ModelConfig:
    """A model of ``heads`` key/value heads with two query heads each: a sandwich layer and a shared one."""
    sizes = {"hidden_size": 64, "num_heads_q": 2 * heads, "num_heads_kv": heads}
    return CONFIG.replace(**(sizes | changes))


def model_of(
    config: ModelConfig, fast: FastConfig | None, public: bool = False, *, device: str = "cpu", **eager: Any
) -> Any:
    model: torch.nn.Module = HappyHorse(config, **eager)
    model.load_state_dict(golden.recipe_weights(config, 3))
    model.to(device)
    if public:
        model = PublicLayout(model)
    return model if fast is None else hh.accelerate(model, fast)


def outputs(model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    with torch.no_grad():
        result = model(*inputs)
    return [x.cpu().numpy() for x in ([result] if isinstance(result, torch.Tensor) else result)]


def alone_and_together(
    rank: int,
    ranks: int,
    config: ModelConfig,
    fast: FastConfig | None,
    sizes: tuple[int, ...],
    public: bool = False,
    *,
    device: str = "cpu",
    **eager: Any,
) -> tuple[Any, Any, Any]:
    """One process's outputs (on rank 0), this rank's, and again."""
    inputs = tuple(x.to(device) for x in clip(*sizes))
    if public:
        inputs = packed(inputs)
    model = model_of(config, fast, public, device=device, **eager)
    alone = outputs(model, inputs) if rank == 0 else None
    # On a GPU the others wait while rank 0 compiles.
    hh.parallelize(model, init_device_mesh(device, (ranks,)), timeout=30 if device == "cpu" else 120)
    together, again = outputs(model, inputs), outputs(model, inputs)
    return alone, together, again


def clips_of_pairs(rank: int, fast: FastConfig) -> dict[int, list[Any]]:
    """Four processes, two to a clip: latents of three clips by their place."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("clips", "rows"))
    model = hh.parallelize(model_of(config_of(2), fast), mesh["rows"], timeout=30)
    seeds = hh.clips_of_rank([7, 8, 9], mesh["clips"])
    return {place: sampled_by(model, seed, "generator", False) for place, seed in seeds}


def held_sizes(rank: int, ranks: int, config: ModelConfig, fast: FastConfig | None, sizes: tuple[int, ...]) -> Any:
    """(rows, channels) of the residual stream before layers; of attention's q, k, v; of all tensors made meanwhile."""
    model = hh.parallelize(model_of(config, fast), init_device_mesh("cpu", (ranks,)), timeout=30)
    streams: list[Any] = []
    attended: list[Any] = []
    for layer in model.block.layers:
        layer.register_forward_pre_hook(lambda _, args: streams.append(tuple(args[0].shape)))
        owner = layer if fast is not None else layer.attention
        attend = owner.attend

        def watched(*args: Any, attend: Any = attend, **kwargs: Any) -> Any:
            tensors = args[0][:3] if fast is not None else args[:3]
            attended.append([tuple(x.shape) for x in tensors])
            return attend(*args, **kwargs)

        owner.attend = watched

    class Made(TorchDispatchMode):
        shapes: set[tuple[int, ...]] = set()  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.shapes.add(tuple(out.shape))
            return out

    inputs = clip(*sizes)
    if fast is not None:
        with torch.no_grad():
            model(*inputs)  # makes the clip's state
        streams.clear()
        attended.clear()
    made = Made()
    with torch.no_grad(), made:
        model(*inputs)
    return streams, attended, sorted(made.shapes)


def refusal(rank: int, ranks: int, what: str) -> None:
    """Ask for something that ``parallelize`` or a call of its model refuses."""
    mesh = init_device_mesh("cpu", (ranks,))
    config, fast = config_of(2), FastConfig(backend="reference")
    last = rank == ranks - 1
    if what == "heads":
        hh.parallelize(model_of(config_of(1), None), mesh)
    elif what == "config":
        changes: dict[str, Any] = {"frame_receptive_field": 2} if last else {}
        hh.parallelize(model_of(config.replace(**changes), None), mesh)
    elif what == "acceleration":
        hh.parallelize(model_of(config, fast if last else FastConfig(backend="reference", mlp_rows=128)), mesh)
    elif what == "weights":
        model = model_of(config, fast)
        if last:
            model.block.layers[1].down_weight[0, 3, 5] += 1
        hh.parallelize(model, mesh)
    elif what == "shares":
        hh.parallelize(model_of(config, fast), mesh, shard_weights=last)
    elif what == "version":
        faults.__version__ = "0.0" if last else "1.0"
        try:
            hh.parallelize(model_of(config, None), mesh)
        finally:
            faults.__version__ = hh.__version__
    elif what == "twice":
        hh.parallelize(hh.parallelize(model_of(config, fast), mesh), mesh)
    elif what == "mesh":
        hh.parallelize(model_of(config, fast), init_device_mesh("cpu", (1, ranks)))
    elif what == "accelerate":
        hh.accelerate(hh.parallelize(model_of(config, None), mesh), fast)
    elif what == "pickle":
        pickle.dumps(hh.parallelize(model_of(config, None), mesh))
    elif what == "compile":
        torch.compile(hh.parallelize(model_of(config, fast), mesh), backend="eager", fullgraph=True)(*clip())
    elif what == "step":
        model = hh.parallelize(model_of(config, fast), mesh, timeout=30)
        with hh.at_step(rank, 8):
            model(*clip())
    elif what == "ranges":
        model = hh.parallelize(model_of(config_of(2, local_attn_layers=(1,)), fast, public=True), mesh, timeout=30)
        whole = torch.tensor([[0, 10]])
        model(*packed(clip())[:4], SimpleNamespace(q_ranges=whole, k_ranges=whole - rank))
    elif what in ("shape", "noise"):
        model = hh.parallelize(model_of(config, fast), mesh, timeout=30)
        video, audio, text = clip(3 if what == "shape" and last else 2)
        model(video + (what == "noise") * rank, audio, text)


def called_again(rank: int, ranks: int) -> tuple[str, bool]:
    """What a call of other shapes raises, and whether the next one, to which a rank comes late, is answered."""
    model = hh.parallelize(model_of(config_of(2), None), init_device_mesh("cpu", (ranks,)), timeout=30)
    try:
        model(*clip(2 + rank))
    except ValueError as error:
        said = str(error)
    time.sleep(1.2 * rank)  # the others look for reports meanwhile
    return said, np.isfinite(outputs(model, clip())[0]).all()


def restored(rank: int, ranks: int, accelerated: bool) -> tuple[bool, bool]:
    """Whether ``restore`` gives one process's model back, and whether a second ``parallelize`` still works."""
    config, inputs = config_of(2), clip()
    fast = FastConfig(backend="reference") if accelerated else None
    mesh = init_device_mesh("cpu", (ranks,))
    eager = outputs(model_of(config, None), inputs)
    model = hh.parallelize(model_of(config, fast), mesh, timeout=30)
    together = outputs(model, inputs)
    back = outputs(hh.restore(model), inputs)
    again = outputs(hh.parallelize(model if fast is None else hh.accelerate(model, fast), mesh, timeout=30), inputs)
    same = all(map(np.array_equal, eager, back)) and ranks_of(copy.deepcopy(model)) is ranks_of(model) is not None
    return same, all(map(np.array_equal, together, again))


def layers_seen(rank: int, ranks: int, fast: FastConfig | None) -> list[float]:
    """How far the residual stream that ``on_layer`` sees of all ranks is from one process's, per layer."""
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for together in (False, True):
        model = model_of(config_of(2), fast)
        if together:
            hh.parallelize(model, init_device_mesh("cpu", (ranks,)), timeout=30)
        with torch.no_grad():
            model(*clip(4, 64, 13), on_layer=lambda _, x, kept=seen[together]: kept.append(x.clone()))
    return [float((a - b).norm() / a.norm()) for a, b in zip(seen[False], seen[True], strict=True)]


def fails_at_layer(rank: int, ranks: int, culprit: int, how: str, timeout: float) -> None:
    """One rank dies, hangs or raises in a layer; the others' errors are what matters."""
    model = model_of(config_of(ranks), FastConfig(backend="reference"))
    hh.parallelize(model, init_device_mesh("cpu", (ranks,)), timeout=60)
    model(*clip())  # ranks start together from here
    ranks_of(model).meeting.timeout = timeout

    def fault(*_: Any) -> None:
        if how == "dies":
            os._exit(3)
        if how == "hangs":
            time.sleep(600)
        raise MemoryError("no memory left")

    if rank == culprit:
        model.block.layers[1].register_forward_pre_hook(fault)
    model(*clip())


def comes_late(rank: int, ranks: int, culprit: int, timeout: float) -> None:
    """One rank does not come to a call."""
    model = hh.parallelize(model_of(config_of(ranks), None), init_device_mesh("cpu", (ranks,)), timeout=60)
    ranks_of(model).meeting.timeout = timeout
    if rank == culprit:
        time.sleep(600)
    model(*clip())


def cancelled(rank: int, ranks: int, culprit: int) -> None:
    """A run that one rank's callback ends after its first step."""
    model = hh.parallelize(model_of(config_of(2), None), init_device_mesh("cpu", (ranks,)))

    def callback(info: Any) -> None:
        if rank == culprit:
            raise InterruptedError(f"enough after step {info.step}")

    hh.sample(model, *clip(), steps=2, callback=callback, progress=False)


def sampled(rank: int, ranks: int, fast: FastConfig | None, noise: str, image: bool) -> list[Any]:
    """Latents of two steps on this rank; every rank's global generator is of another seed."""
    model = hh.parallelize(model_of(config_of(2), fast), init_device_mesh("cpu", (ranks,)), timeout=30)
    return sampled_by(model, rank, noise, image)


def sampled_by(model: Any, seed: int, noise: str, image: bool) -> list[Any]:
    video, audio, text = clip(4, 64, 13)
    torch.manual_seed(seed)
    kinds: dict[str, Any] = {
        "global": None,
        "generator": torch.Generator().manual_seed(seed),
        "named": lambda name, shape: golden.draw(5, name, shape),
    }
    first = video[:, :, :1] / 2 if image else None
    latents = hh.sample(model, video, audio, text, steps=2, noise=kinds[noise], image=first, progress=False)
    return [x.numpy() for x in latents]


def both_stages(rank: int, ranks: int, fast: FastConfig) -> list[Any]:
    """Latents of a picture's clip and of its second stage on this rank, and rank 0's alone."""
    config, (video, audio, text) = config_of(8, coords_style="v1"), clip(3, 16, 9, 4)
    how: dict[str, Any] = {"steps": 2, "progress": False}

    def made(model: Any) -> list[Any]:
        noise = torch.Generator().manual_seed(5)
        video_out, audio_out = hh.sample(model, video, audio, text, image=video[:, :, :1] / 2, noise=noise, **how)
        large = hh.super_resolve(model, video_out, audio_out, text, (4, 40), noise=noise, **how)
        return [x.numpy() for x in (video_out, audio_out, large)]

    alone = made(model_of(config, fast)) if rank == 0 else []
    return [made(hh.parallelize(model_of(config, fast), init_device_mesh("cpu", (ranks,)), timeout=60)), alone]


def command(rank: int, ranks: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program, started as torchrun would."""
    said = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, said), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return code, out.getvalue(), err.getvalue()


def generated(rank: int, ranks: int, arguments: list[str], sides: dict[str, tuple[int, int]], cache: str) -> Any:
    """:func:`command` with other frame sizes and a cache of its own; an mp4 at 1080p takes a CPU an hour."""
    with mock.patch.object(tokens, "SIDES", sides), mock.patch.dict(os.environ, {"HAPPYHORSE_FAST_CACHE": cache}):
        return command(rank, ranks, arguments)


def sharded(rank: int, ranks: int, fast: FastConfig | None, folder: str | None) -> dict[str, Any]:
    """Bytes of matrices on this rank and in all, and whether whole and sharded weights give the same outputs."""
    config, inputs, mesh = config_of(2), clip(), init_device_mesh("cpu", (ranks,))
    whole = hh.parallelize(model_of(config, fast), mesh, timeout=30)
    wanted = outputs(whole, inputs)
    if folder is None:
        model = hh.parallelize(model_of(config, fast), mesh, timeout=30, shard_weights=True)
    else:
        packed_already = (Path(folder) / PACKED_FILE).exists()
        model = hh.load(folder, config=None if packed_already else config, fast=fast, shard=mesh, progress=False)
        hh.parallelize(model, mesh, timeout=30)
    matrices = [x for x in model.block.layers.state_dict().values() if x.numel() > 1000]
    there = outputs(model, inputs), outputs(model, inputs)
    after = [x for x in model.block.layers.state_dict().values() if x.numel() > 1000]
    try:
        back = outputs(hh.restore(model), inputs)
        restored: Any = all(map(np.array_equal, back, outputs(model_of(config, None), inputs)))
    except ValueError as error:
        restored = str(error)
    return {
        "here": held_bytes(matrices),
        "after": held_bytes(after),
        "all": sum(x.nbytes for x in matrices),
        "same": all(np.array_equal(a, b) for result in there for a, b in zip(wanted, result, strict=True)),
        "restored": restored,
    }


def clips_of_a_pipeline(rank: int, ranks: int, folder: str, sides: dict[str, tuple[int, int]]) -> list[Any]:
    """Frames of two clips by one pipeline, on rank 0; hosts have unlike room for a model that waits."""
    mesh = init_device_mesh("cpu", (ranks,))
    with (
        mock.patch.object(tokens, "SIDES", sides),
        mock.patch.object(residency, "available_bytes", return_value=rank * 2**40),
        mock.patch.dict(os.environ, {"HAPPYHORSE_FAST_PROMPT_CACHE": "0"}),
        mock.patch.object(company, "parallelize", partial(hh.parallelize, timeout=60)),
    ):
        pipe = hh.Pipeline.from_pretrained(folder, precision="bf16", device="cpu", mesh=mesh)
        if rank:
            pipe.follow(), pipe.follow()
            return []
        how: dict[str, Any] = {"seconds": 3, "resolution": "256p", "stages": 1, "progress": False}
        return [pipe("a ball", **how).frames.numpy() for _ in range(2)]


def shares_of(rank: int, ranks: int, folder: str) -> None:
    """Load a share of another checkpoint on every rank, and parallelize."""
    mesh = init_device_mesh("cpu", (ranks,))
    model = hh.load(f"{folder}/{rank}", config=config_of(2), shard=mesh, progress=False)
    hh.parallelize(model, mesh, timeout=30)


class Live(TorchDispatchMode):
    """The largest sum of live storages' bytes, as they are: FSDP2 frees a storage by resizing it."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, Any] = {}
        self._see(tensors)

    def _see(self, tensors: Iterable[Any]) -> None:
        for x in tensors:
            if isinstance(x, torch.Tensor) and not hasattr(x, "to_local"):
                storage = x.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self._storages.pop, storage._cdata).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(tree_leaves((args, kwargs, out)))
        there = [storage() for storage in list(self._storages.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in there if storage is not None))
        return out


def whole_layers(rank: int, ranks: int, folder: str, config: ModelConfig | None, fast: FastConfig | None) -> list[int]:
    """While a share of a model is loaded: in how many layers the largest matrix is whole, each time one is spread."""
    counts = []

    def counted(layer: torch.nn.Module, mesh: Any) -> None:
        size = max(x.numel() for x in (*layer.parameters(), *layer.buffers()))
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta]
        counts.append(len({x.untyped_storage()._cdata for x in tensors if x.numel() == size}))
        del tensors
        spread(layer, mesh)

    mesh = init_device_mesh("cpu", (ranks,))
    gc.collect()
    with mock.patch.object(load, "spread", counted):
        hh.load(folder, config=config, fast=fast, shard=mesh, progress=False)
    return counts


def gathered_bytes(rank: int, ranks: int, fast: FastConfig | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a rank holds of sharded weights and what of them is whole at the peak, in bytes: found, and on paper."""
    mesh, config = init_device_mesh("cpu", (ranks,)), config_of(2, hidden_size=256, num_layers=3, mm_layers=(0, 1))
    beside_weights = {}
    for shard in (False, True):
        model = model_of(config, fast)
        paper = sharded_bytes(model, ranks)
        hh.parallelize(model, mesh, shard_weights=shard, timeout=30)
        outputs(model, clip())  # makes what is kept
        held = [local(x) for x in (*model.parameters(), *model.buffers())]
        peaks = []
        for _ in range(3 if shard else 1):  # a thread of gloo's may hold what has arrived a little longer
            with Live(held) as live:
                outputs(model, clip())
            peaks.append(live.peak)
        beside_weights[shard] = min(peaks) - held_bytes(held)
    return (held_bytes(held), beside_weights[True] - beside_weights[False]), paper
