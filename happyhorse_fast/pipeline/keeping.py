"""Where a run's latents are kept: in the file that was asked for, else until the run has ended well."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from pathlib import Path

from happyhorse_fast.files import is_special
from happyhorse_fast.pipeline.latents import Latents

logger = logging.getLogger(__name__)


class Keeper:
    """Saves latents stage by stage; where the run inside it fails they stay, and a warning says where.

    Args:
        named: File that keeps them for good, or None.
        target: The mp4 of the run; without ``named`` they are kept beside it, or else in a temporary folder.
    """

    def __init__(self, named: Path | None, target: Path | None) -> None:
        self.named, self.target = named, target
        self.path: Path | None = None
        self._folder: Path | None = None

    def save(self, latents: Latents) -> None:
        """Save them over those of the stage before. Where that fails, in a temporary folder; a warning says so.

        A full disk must not lose what took minutes, nor end a run that may still give its clip.
        """
        try:
            path = self.path or self.named or self._beside() or self._temporary()
            latents.save(path)
            self.path = path
        except OSError as error:
            logger.warning("the latents cannot be kept where they should be: %s", error)
            try:
                self.path = self._temporary()
                latents.save(self.path)
            except OSError as again:
                self.path = None
                self._empty()
                logger.warning("nor in a temporary folder: %s; the run goes on without", again)
            else:
                logger.warning("the latents are kept in %s", self.path)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.path is not None:
            logger.warning("the latents of this run are kept in %s: resume goes on from them", self.path)
        elif self.named is None:
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            self._empty()

    def _empty(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _beside(self) -> Path | None:
        if self.target is None or is_special(self.target):
            return None
        ends = (".latents.safetensors", *(f".latents-{i}.safetensors" for i in range(1, 1000)))
        candidates = (self.target.with_name(self.target.stem + end) for end in ends)
        return next(itertools.dropwhile(Path.exists, candidates), None)  # those of an earlier run stay

    def _temporary(self) -> Path:
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="happyhorse-fast."))
        return self._folder / "clip.latents.safetensors"
