"""Processes that share a gloo group, started once and reused: what a test asks is a function that every rank calls."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# Of a rank's 1.6 s until it samples or shards, 1.5 are imports. The first maps the kernels where nothing is installed.
_PRELOADED = ["bench.bootstrap", "rank_work", "torch._dynamo", "torch.distributed.fsdp", "happyhorse_fast.sampler"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


def _start_server() -> None:
    """The process that ranks are forked from, which has imported what takes seconds.

    Python 3.11's has not our path, and leaves out in silence what it cannot import.
    """
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()


class RankPool:
    """``ranks`` processes; the store is the test's own, as torchrun's agent has it, so that it outlives any of them."""

    def __init__(self, ranks: int) -> None:
        _start_server()
        self.ranks = ranks
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(ranks):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, self._store.port, ranks, rank), daemon=True)
            process.start()
            there.close()  # or the end of a rank would not be seen
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What ``work(rank, ...)`` returns on every rank; an exception that one raises is an item."""
        for pipe in self.pipes:
            pipe.send((work, args, kwargs))
        return [self.answer(rank, 600) for rank in range(self.ranks)]

    def answer(self, rank: int, seconds: float) -> Any:
        """What a rank returned or raised."""
        if not self.pipes[rank].poll(seconds):
            raise TimeoutError(f"rank {rank} did not answer within {seconds:g} s")
        return self.pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def rank_pool(ranks: int) -> Iterator[RankPool]:
    pool = RankPool(ranks)
    try:
        yield pool
    finally:
        pool.close()


def _serve(pipe: Any, port: int, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, world_size=ranks, rank=rank, timeout=timedelta(seconds=60))
    while True:
        work, args, kwargs = pipe.recv()
        try:
            result = work(rank, *args, **kwargs)
        except Exception as error:
            result = error
        pipe.send(result)
