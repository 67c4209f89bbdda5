"""Where the parts of the whole path lie: under published names below one folder, or as its ``pipeline.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.pipeline.codec_files import read_json

NOTE = "pipeline.json"
"""File beside the parts, which may say where one lies and of which configuration a model is."""
DEFAULTS = "defaults"
"""Beside the parts in that file: the command line's settings where its options are left out."""
_SETTINGS = ("seconds", "resolution", "aspect", "stages")
_FIELDS = ("path", "preset", "config")


@dataclass(frozen=True)
class Part:
    """A part of the whole path as it is published.

    Attributes:
        name: In ``pipeline.json`` and in messages.
        what: It is.
        places: Where it is looked for below the folder, first come first.
        source: Repository that publishes it.
        terms: Its licence, and whether access has to be asked for.
        preset: Configuration of the published model; None where the part is no Transformer.
    """

    name: str
    what: str
    places: tuple[str, ...]
    source: str
    terms: str
    preset: str | None = None


def _magihuman(name: str, what: str, preset: str | None = None) -> Part:
    return Part(name, what, (name,), f"GAIR/daVinci-MagiHuman, folder {name}", "Apache-2.0", preset)


PARTS = {
    part.name: part
    for part in (
        _magihuman("distill", "distilled model of the first stage", "davinci-magihuman"),
        _magihuman("base", "base model of the first stage", "davinci-magihuman"),
        _magihuman("540p_sr", "model of the second stage at 540p", "davinci-magihuman-sr-540p"),
        _magihuman("1080p_sr", "model of the second stage at 1080p", "davinci-magihuman-sr-1080p"),
        _magihuman("turbo_vae", "turbo video decoder"),
        Part(
            "text_encoder",
            "text encoder",
            ("t5gemma-9b-9b-ul2", "google/t5gemma-9b-9b-ul2", "text_encoder"),
            "google/t5gemma-9b-9b-ul2",
            "Gemma terms of use, access on request",
        ),
        Part(
            "video_vae",
            "video autoencoder",
            ("Wan2.2-TI2V-5B-Diffusers/vae", "Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae", "video_vae"),
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers, folder vae",
            "Apache-2.0",
        ),
        Part(
            "audio_vae",
            "audio autoencoder",
            (
                "stable-audio-open-1.0/vae",
                "stable-audio-open-1.0",
                "stabilityai/stable-audio-open-1.0/vae",
                "stabilityai/stable-audio-open-1.0",
                "audio_vae",
            ),
            "stabilityai/stable-audio-open-1.0",
            "Stability AI Community License, access on request",
        ),
    )
}
SECOND_STAGES = {"540p": "540p_sr", "1080p": "1080p_sr"}
"""Resolution -> model that makes it of a small clip."""
FIRST_STAGES = {"distilled": "distill", "base": "base"}


@dataclass(frozen=True)
class Layout:
    """A folder of parts.

    Attributes:
        folder: Holds the parts under their published names.
        given: Part -> folder named by the caller; it goes before everything else.
        noted: Part -> what ``pipeline.json`` says of it.
        defaults: Settings of the command line where its options are left out, as ``pipeline.json`` has them.
    """

    folder: Path
    given: Mapping[str, Path] = field(default_factory=dict)
    noted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def there(self, name: str) -> bool:
        """Whether a part is found; what :meth:`find` would return may still be no good."""
        return any(place.exists() for place in self._places(name))

    def find(self, name: str) -> Path:
        """Folder of a part.

        Raises:
            FileNotFoundError: It is not there; says where it is published and on which terms.
        """
        places = self._places(name)
        for place in places:
            if place.exists():
                return place
        part = PARTS[name]
        looked = " or ".join(str(place) for place in places[:2])
        raise FileNotFoundError(
            f"the {part.what} ({name}) is not there, looked for {looked}: it is published as {part.source} "
            f"({part.terms}) and nothing is downloaded; put it there or name its folder in {self.folder / NOTE}"
        )

    def model(self, name: str) -> dict[str, Any]:
        """Path, preset and configuration of a Transformer, as the arguments of :func:`checkpoint.load.load`.

        Preset and configuration are left out of packed weights there, which carry their own.
        """
        noted = self.noted.get(name, {})
        config = noted.get("config")
        preset = noted.get("preset", None if config is not None else PARTS[name].preset)
        try:
            made = None if config is None else ModelConfig(**config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / NOTE}: config of {name}: {error}") from error
        return {"path": self.find(name), "preset": preset, "config": made}

    def _places(self, name: str) -> list[Path]:
        if name in self.given:
            return [self.given[name]]
        noted = self.noted.get(name, {}).get("path")
        if noted is not None:
            return [self.folder / noted]  # which an absolute path replaces
        return [self.folder / place for place in PARTS[name].places]


def read_layout(folder: str | Path, given: Mapping[str, str | Path | None]) -> Layout:
    """Find the parts below a folder.

    Args:
        folder: With parts under their published names, and a ``pipeline.json`` where something differs: a JSON object
            from parts to ``path`` (relative to the folder), and of models ``preset`` or ``config``; ``defaults`` in it
            are the command line's.
        given: Part -> its folder, before everything else; None for none.

    Raises:
        FileNotFoundError: No such folder, or none of the models is in it.
        CheckpointError: ``pipeline.json`` is none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder must hold the published parts, there is none at {root}; {how_to_get()}")
    named = {name: Path(path).expanduser() for name, path in given.items() if path is not None}
    note = _read_note(root / NOTE)
    layout = Layout(root, named, note, note.pop(DEFAULTS, {}))
    if not any(layout.there(name) for name in FIRST_STAGES.values()):
        raise FileNotFoundError(f"{root}: holds neither {' nor '.join(FIRST_STAGES.values())}; {how_to_get()}")
    return layout


def how_to_get() -> str:
    """Where the models are published, in a few words."""
    return (
        "the models are published as GAIR/daVinci-MagiHuman (Apache-2.0) and nothing is downloaded; "
        "`python examples/tiny_checkpoint.py DIR` writes a tiny random one"
    )


def _read_note(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    content = read_json(file)
    for name, said in content.items():
        if name == DEFAULTS:
            if not isinstance(said, dict) or not set(said) <= set(_SETTINGS):
                raise CheckpointError(f"{file}: {DEFAULTS} may hold {', '.join(_SETTINGS)}; got {said!r:.80}")
            continue
        if name not in PARTS:
            raise CheckpointError(f"{file}: parts are {', '.join(PARTS)}; got {name!r}")
        if not isinstance(said, dict) or not set(said) <= set(_FIELDS) or {"preset", "config"} <= set(said):
            raise CheckpointError(
                f"{file}: of {name} may be said path, and of a model preset or config; got {said!r:.80}"
            )
        wrong = [key for key in ("path", "preset") if not isinstance(said.get(key, ""), str)]
        if wrong or not isinstance(said.get("config", {}), dict):
            raise CheckpointError(f"{file}: of {name}, path and preset must be text and config an object")
        if PARTS[name].preset is None and set(said) - {"path"}:
            raise CheckpointError(f"{file}: of {name}, which is no Transformer, path alone can be said")
    return content
