"""The ranks that share a sequence, and what they send each other, on torch.distributed.

Tensors travel as bytes: gloo knows no e4m3 ("Invalid scalar type"), and codes need no arithmetic on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from happyhorse_fast.parallel.faults import Meeting, RankError, said_of

Finish = Callable[[torch.Tensor], torch.Tensor]
# The second is its name before torch 2.13, which warns of it.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class Transfer:
    """A tensor on its way, beside what this rank computes; what was sent is held until it has arrived."""

    def __init__(self, ranks: Ranks, work: Any, sent: torch.Tensor, arriving: torch.Tensor, finish: Finish) -> None:
        self._ranks, self._work, self._finish = ranks, work, finish
        self._tensors: list[torch.Tensor] = [sent, arriving]

    def wait(self) -> torch.Tensor:
        """The tensor, once: on a GPU the current stream waits for it, on a CPU this call.

        Raises:
            RankError: A rank died, failed or did not answer in time; names it.
        """
        arriving = self._tensors.pop()
        self._ranks.arrived(self._work, arriving)
        self._tensors.clear()
        return self._finish(arriving)


class Ranks:
    """Processes that hold the same weights and share every sequence.

    Args:
        group: Of torch.distributed.
        meeting: Where its ranks meet on the CPU, and tell each other of faults.

    Attributes:
        size: Number of ranks P.
        rank: This one, 0 to P - 1.
    """

    def __init__(self, group: dist.ProcessGroup | None, meeting: Meeting) -> None:
        self.size, self.rank, self.meeting = meeting.size, meeting.rank, meeting
        self._group = group

    @contextmanager
    def call(self, step: Callable[[], str] = str, **inputs: object) -> Iterator[None]:
        """A forward pass of all ranks, on the same inputs; on a GPU it ends when the device has ended.

        Args:
            step: Says which of a run's steps it is.
            inputs: To be compared, tensors by dtype, shape and values.

        Raises:
            ValueError: Another rank was called with other inputs, of shape, dtype or values; names both. Or the call is
                traced, or captured in a CUDA graph.
            RankError: As :meth:`Transfer.wait`.
        """
        if torch.compiler.is_compiling():
            raise ValueError("a parallelized model runs as it is, got a call that torch.compile or export traces")
        gpu = next((x.device for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_cuda), None)
        if gpu is not None and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a parallelized model runs as it is, got a call in the capture of a CUDA graph: its replays would "
                "neither compare what ranks are called with nor name a rank that is gone"
            )
        with self.meeting.call():
            self.meeting.agree({"step": step()} | {name: said_of(value) for name, value in inputs.items()})
            yield
            if gpu is not None:
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(gpu))  # by itself it would take the current device's
                self.meeting.until(event.query)

    def exchange(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int], finish: Finish) -> Transfer:
        """All-to-all along the first dimension: ``sent[r]`` rows go to rank r, ``received[r]`` come from it.

        Args:
            x: [sum(sent), ...], contiguous; not to be written to before the transfer is waited for.
            sent: Rows for each rank.
            received: Rows from each rank; what ranks say of each other must agree.
            finish: Makes the result of what arrived, [sum(received), ...].
        """
        arriving = x.new_empty((sum(received), *x.shape[1:]))
        work = self._start(dist.all_to_all_single, _bytes(arriving), _bytes(x), list(received), list(sent))
        return Transfer(self, work, x, arriving, finish)

    def gather(self, x: torch.Tensor, held: Sequence[int]) -> torch.Tensor:
        """[held[rank], ...] of every rank, one after another: [sum(held), ...].

        Raises:
            RankError: As :meth:`Transfer.wait`.
        """
        most, missing = max(held), max(held) - len(x)
        padded = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x.contiguous()
        every = x.new_empty((self.size * most, *x.shape[1:]))
        self.arrived(self._start(_all_gather, _bytes(every), _bytes(padded)), every)
        return torch.cat([part[:count] for part, count in zip(every.split(most), held, strict=True)])

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of every element over the ranks; float32, in place.

        Raises:
            RankError: As :meth:`Transfer.wait`.
        """
        self.arrived(self._start(dist.all_reduce, x, dist.ReduceOp.MAX), x)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """What rank 0 has, on every rank; contiguous, in place.

        Raises:
            RankError: As :meth:`Transfer.wait`.
        """
        self.arrived(self._start(dist.broadcast, _bytes(x), group_src=0), x)
        return x

    def arrived(self, work: Any, x: torch.Tensor) -> None:
        """Wait for a collective that writes ``x``: a CPU until it is done, a GPU's stream.

        Raises:
            RankError: As :meth:`Transfer.wait`.
        """
        try:
            # A group that was made without a backend's name has gloo for CPUs, and is called "undefined".
            if not x.is_cuda or dist.get_backend(self._group) == "gloo":
                self.meeting.until(work.is_completed)
            work.wait()
        except RuntimeError as error:
            self._lost(error)

    def _start(self, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        try:
            return collective(*tensors, group=self._group, async_op=True, **options)
        except RuntimeError as error:
            self._lost(error)

    def _lost(self, error: Exception) -> NoReturn:
        if isinstance(error, RankError):
            raise error
        self.meeting.fault(error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The same ranks: a copy of a model runs on them too."""
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle: a group of processes is of this run."""
        raise TypeError("a parallelized model does not pickle (nor torch.save): restore(model) first")


class Planned(Ranks):
    """Ranks that are not there: what they would send takes memory and goes nowhere, to measure a rank's peak."""

    def __init__(self, size: int, rank: int = 0) -> None:
        super().__init__(None, Meeting(HashStore(), 1, 0, 0.0))
        self.size, self.rank = size, rank

    @contextmanager
    def call(self, step: Callable[[], str] = str, **inputs: object) -> Iterator[None]:
        """Nobody else is called."""
        yield

    def arrived(self, work: Any, x: torch.Tensor) -> None:
        """Nothing is on its way."""

    def _start(self, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        return None


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """[n, ...], contiguous, as bytes [n, bytes of a row]."""
    return (x.flatten(1) if x.dim() > 1 else x[:, None]).view(torch.uint8)
