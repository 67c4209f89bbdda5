"""A run over several ranks: rank 0 reads, decides, decodes and writes; all of them take part in what denoises."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from happyhorse_fast.fast.parallelize import TIMEOUT, parallelize
from happyhorse_fast.parallel.faults import Meeting
from happyhorse_fast.pipeline.memory_plan import PipelinePlan
from happyhorse_fast.pipeline.request import Request

P = ParamSpec("P")
R = TypeVar("R")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Work:
    """A stage that all ranks take part in, as rank 0 tells of it.

    Attributes:
        stage: Name of a method of :class:`~happyhorse_fast.pipeline.run.Run`.
        request: The run's settings.
        placing: How its parts lie on the device.
        noise: State of the run's generator.
        given: Arguments of the method, tensors on the CPU.
    """

    stage: str
    request: Request
    placing: PipelinePlan
    noise: torch.Tensor
    given: tuple[Any, ...]


class Company:
    """The ranks that make clips together.

    Args:
        mesh: One-dimensional ``DeviceMesh``.
        shard_weights: Whether a rank keeps a share of the models' weights, not all of them.

    Attributes:
        meeting: Where rank 0 says what is to be done.
    """

    def __init__(self, mesh: Any, shard_weights: bool) -> None:
        self.mesh, self.shard_weights = mesh, shard_weights
        self.meeting = Meeting.of(mesh, TIMEOUT)

    def load(self, load: Callable[..., Model], **how: Any) -> Model:
        """What :func:`happyhorse_fast.load` gives, parallelized; every rank calls this."""
        return parallelize(load(**how, shard=self.mesh if self.shard_weights else None), self.mesh)

    def tell(self, work: Work | None) -> None:
        """Say on rank 0 what all do next; None: the rest of the clip is rank 0's."""
        self.meeting.from_first(pickle.dumps(work))

    def hear(self) -> Work | None:
        """What rank 0 told.

        Raises:
            RankError: Rank 0 failed, or said nothing in time.
        """
        told: Work | None = pickle.loads(self.meeting.from_first())
        return told


def tells_faults(method: Callable[P, R]) -> Callable[P, R]:
    """Tell the other ranks of what a pipeline's method raises, where there are others."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        pipeline: Any = args[0]
        company: Company | None = pipeline.parts.company
        with nullcontext() if company is None else company.meeting.call():
            return method(*args, **kwargs)

    return run
