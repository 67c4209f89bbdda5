"""Clips and the comparison of ranks with one process."""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_pool import RankPool
from rank_work import alone_and_together

SIX_TILES = (4, 64, 13)
"""Frames of a tile each: three tiles a rank of two, and of four ranks the last has two dummies."""
UNEVEN = (3, 50, 140, 7)
"""Frames of 100 tokens, audio of more than a tile: six tiles, in which modalities end."""
WINDOW: dict[str, Any] = {"local_attn_layers": (1,), "frame_receptive_field": 1}


def check(
    pool: RankPool, config: Any, how: Any, sizes: tuple[int, ...] = SIX_TILES, within: float = 0.0, **options: Any
) -> list[np.ndarray]:
    """Hold every rank's outputs against one process's, to the bit or in relative L2; and against its own again."""
    results = pool(alone_and_together, pool.ranks, config, how, sizes, **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    alone = results[0][0]
    for rank, (_, together, again) in enumerate(results):
        for wanted, there, repeated in zip(alone, together, again, strict=True):
            assert np.array_equal(there, repeated), f"rank {rank} differs from itself"
            apart = np.linalg.norm(there - wanted) / np.linalg.norm(wanted)
            assert np.isfinite(there).all() and apart <= within, f"rank {rank}: {apart:.2e} from one process"
    return alone
