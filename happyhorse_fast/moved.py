"""Paths of modules that moved: an import of one raises an ImportError with its new place, for one release."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPS = "from happyhorse_fast.ops import"
MOVED = {
    "happyhorse_fast.model": "accelerate, load and FastConfig are names of happyhorse_fast, the modules are in "
    "happyhorse_fast.fast and happyhorse_fast.checkpoint",
    "happyhorse_fast.reference": "HappyHorse is a name of happyhorse_fast, the modules are in happyhorse_fast.eager",
    "happyhorse_fast.ops.block_sparse_attention": f"{OPS} block_sparse_attention",
    "happyhorse_fast.ops.fp8_linear": f"{OPS} fp8_linear, fp8_linear_residual, fp8_linear_activation",
    "happyhorse_fast.ops.packing": f"{OPS} pack_linear",
    "happyhorse_fast.ops.packing_qkv": f"{OPS} pack_qkv_weight, pack_qk_norm, pack_cos_sin, static_qk_scale",
    "happyhorse_fast.ops.quantize_rows": f"{OPS} quantize_rows",
    "happyhorse_fast.ops.rmsnorm_qkv": f"{OPS} rmsnorm_quantize, qkv_linear; the op rmsnorm_qkv is gone: call "
    "rmsnorm_quantize, then qkv_linear; one kernel for both took 19.2 ms on an H200, the two take 8.6",
    "happyhorse_fast.ops.sdpa": "from happyhorse_fast import attention",
    "happyhorse_fast.ops.select_blocks": f"{OPS} select_blocks",
}
"""Old path -> what to import instead."""


class Moved(MetaPathFinder):
    """Comes last among the finders, for names that no other finds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Finds nothing.

        Raises:
            ImportError: The module moved; the message says where.
        """
        if fullname in MOVED:
            raise ImportError(f"{fullname} moved: {MOVED[fullname]}", name=fullname)


def tell() -> None:
    """Install the finder, once a process."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
