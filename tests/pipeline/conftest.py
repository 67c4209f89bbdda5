"""The tiny checkpoint, written once for all tests of the whole path."""

from pathlib import Path

import pytest

from happyhorse_fast.pipeline.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny checkpoint, only to be read: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder)
    return folder
