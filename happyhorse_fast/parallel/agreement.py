"""What ranks must have in common before the first step: versions, configuration, weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping

import torch
from torch import nn

from happyhorse_fast._version import __version__
from happyhorse_fast.parallel.faults import said_of

DIGEST = "digest_of_whole_weights"
"""Attribute of a layer whose weights are spread over ranks."""


def versions() -> dict[str, str]:
    """Of this package and of what decides a result's bits, on this machine."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"happyhorse_fast": __version__, "torch": torch.__version__, "python": python}


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's weights: keys, dtypes, shapes, and the sum of every tensor's bits.

    Tells checkpoints apart, not tensors whose elements changed places. A layer that is spread over ranks has kept the
    digest of what it was. Reads every weight once: 33 GiB of a bf16 15B model, predicted 10 ms of an H100.
    """
    kept = {f"{path}.": getattr(part, DIGEST) for path, part in model.named_modules() if hasattr(part, DIGEST)}
    tensors: Mapping[str, torch.Tensor] = model.state_dict()
    said = {key: said_of(value) for key, value in tensors.items() if not key.startswith(tuple(kept))} | kept
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()
