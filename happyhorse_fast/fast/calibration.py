"""Calibration files: which ops of a model lose too much in 8 bits. ``verify --calibrate`` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from happyhorse_fast.config import OPS, ModelConfig

FORMAT = 1
"""Version of the file."""
ATTENTION = {"int8": "int8_qk", "fp8": "fp8"}
"""Format -> that of attention in its list."""
MOST = {"bf16": 0.05, "int8": 0.05, "fp8": 0.1}
"""Relative L2 past which an op is skipped, or reported in bf16: more than what healthy weights lose (docs/OPS.md)."""


@dataclass(frozen=True)
class InputRange:
    """One input of an op, over all tokens, steps and clips.

    Attributes:
        largest: Largest magnitude.
        rms: Root mean square.
        saturated: Share past e4m3's largest code under the scale that the op uses. In int8 every row has a scale of its
            own, which nothing is past.
        lost: Share of what is not zero that becomes zero in e4m3.
    """

    largest: float
    rms: float
    saturated: float
    lost: float


@dataclass(frozen=True)
class OpCalibration:
    """One op of one layer.

    Attributes:
        layer: Layer number.
        op: One of ``FastConfig``'s.
        inputs: Range of each activation that it reads, by name.
        errors: ``"bf16"``, ``"int8"`` or ``"fp8"`` (:data:`ATTENTION`) -> modality -> relative L2 of the op's result to
            float32's on the same input, in the step where it is largest.
        bound: Of attention: what its scores, and v, can reach by the weights, in powers of two. To 100
            (:data:`score_bound.LIMIT`) the softmax of bf16 and int8_qk is the bounded one. None of other ops.
    """

    layer: int
    op: str
    inputs: dict[str, InputRange]
    errors: dict[str, dict[str, float]]
    bound: float | None = None

    def worst(self, precision: str) -> float:
        """Largest error of a format over video, audio and text."""
        return max(self.errors[precision].values())


@dataclass(frozen=True)
class Calibration:
    """The whole file: its fields are the JSON's.

    Attributes:
        format: :data:`FORMAT`.
        version: Of this package.
        checkpoint: Path of the weights.
        config: The model's :meth:`ModelConfig.to_dict`.
        clips: Clips that were sampled.
        steps: Denoising steps of each.
        grid: Token grid of each.
        text: Text tokens of each.
        seed: Of the first; the next ones follow it.
        most: Format -> relative L2 that an op may have.
        skip: ``"int8"`` and ``"fp8"`` -> :func:`skip_rules`.
        ops: An entry per layer and op.
    """

    format: int
    version: str
    checkpoint: str
    config: dict[str, Any]
    clips: int
    steps: int
    grid: tuple[int, int, int]
    text: int
    seed: int
    most: dict[str, float]
    skip: dict[str, list[str]]
    ops: tuple[OpCalibration, ...]

    @property
    def coarse(self) -> list[OpCalibration]:
        """Ops whose error in bf16 is not within ``most`` either: skipping does not help them."""
        return [of for of in self.ops if not of.worst("bf16") <= self.most["bf16"]]


def skip_rules(ops: Iterable[OpCalibration], precision: str, most: float) -> list[str]:
    """``FastConfig.skip`` of what is not within ``most`` in a format, a rule an op: ``"down:0-3,36"``."""
    found = list(ops)
    rules = []
    for op in OPS:
        layers = sorted(of.layer for of in found if of.op == op and not of.worst(precision) <= most)
        if layers:
            rules.append(f"{op}:{','.join(_spans(layers))}")
    return rules


def _spans(layers: list[int]) -> Iterator[str]:
    for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        span = [layer for _, layer in group]
        yield str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"


def read_skip(path: str | Path, config: ModelConfig) -> dict[str, list[str]]:
    """The ``skip`` lists of a file, by format.

    Args:
        path: What ``happyhorse-fast verify CHECKPOINT --calibrate N`` wrote.
        config: Of the model that they are for.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file, or is of a model of another configuration; names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        _require(isinstance(content, dict) and "skip" in content and "config" in content, "it has no skip and config")
        _require(
            content.get("format") == FORMAT, f"its format is {content.get('format')!r}, this version reads {FORMAT}"
        )
        other = ModelConfig(**content["config"])
        skip = content["skip"]
        _require(isinstance(skip, dict) and set(skip) == set(ATTENTION), f"skip must have {', '.join(ATTENTION)}")
        for rules in skip.values():
            _require(isinstance(rules, list) and all(isinstance(rule, str) for rule in rules), "skip must hold rules")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a calibration that `verify --calibrate` wrote: {error}") from error
    theirs, ours = other.to_dict(), config.to_dict()
    different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if different:
        raise ValueError(f"{path}: calibration must be of this model's configuration, it has {'; '.join(different)}")
    found: dict[str, list[str]] = skip
    return found


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
