"""A checkpoint on disk."""

from pathlib import Path

import pytest
from toy_checkpoint import weights

from happyhorse_fast.checkpoint.load import save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of a small model."""
    save_checkpoint(weights(), tmp_path / "sharded", max_shard_bytes=8000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) >= 4
    return tmp_path / "sharded"
