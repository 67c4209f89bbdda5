"""Processes that share a gloo group, started once and reused: what a test asks is a function that every rank calls."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# Ranks are forked from one process that has imported what takes seconds.
_CONTEXT.set_forkserver_preload(["rank_work"])


class RankPool:
    """``ranks`` processes; the store is the test's own, as torchrun's agent has it, so that it outlives any of them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, self._store.port, ranks, rank), daemon=True)
            process.start()
            self._pipes.append(here)
            self.processes.append(process)

    def __call__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What ``work(rank, ...)`` returns on every rank; an exception that one raises becomes an item."""
        for pipe in self._pipes:
            pipe.send((work, args, kwargs))
        return [self._answer(pipe, process) for pipe, process in zip(self._pipes, self.processes, strict=True)]

    @staticmethod
    def _answer(pipe: Any, process: Any) -> Any:
        while not pipe.poll(0.05):
            if not process.is_alive() and not pipe.poll():
                return EOFError(f"exit code {process.exitcode}")
        try:
            return pipe.recv()
        except EOFError as error:
            return error

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
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
        try:
            work, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            result = work(rank, *args, **kwargs)
        except Exception as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            result = error
        pipe.send(result)
