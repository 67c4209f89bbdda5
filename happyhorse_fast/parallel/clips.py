"""Clips in parallel: every rank samples clips of its own, and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def clips_of_rank(clips: Sequence[T], mesh: Any) -> list[tuple[int, T]]:
    """The clips that this rank is to make, each with its place among all: every P-th, from its own number on.

    Seed noise by the place and a clip is the same whatever the number of ranks. With ranks that share a clip as well,
    take a mesh of two dimensions, one for each::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("clips", "rows"))
        happyhorse_fast.parallelize(model, mesh["rows"])
        for place, prompt in happyhorse_fast.clips_of_rank(prompts, mesh["clips"]):
            ...

    Args:
        clips: Prompts, or whatever a clip is made of, the same on every rank.
        mesh: One-dimensional ``DeviceMesh`` of P ranks.

    Raises:
        ValueError: The mesh has several dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: {list(mesh.mesh.shape)}")
    rank, ranks = mesh.get_local_rank(), mesh.size()
    return list(enumerate(clips))[rank::ranks]
