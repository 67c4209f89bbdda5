"""Options of acceleration: precision, sparsity, backend, and where to stay exact."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from happyhorse_fast.arguments import real_number, require_whole, whole_number
from happyhorse_fast.config import OPS, ModelConfig
from happyhorse_fast.fast.calibration import ATTENTION, read_skip

Precision = Literal["bf16", "int8", "fp8"]
AttentionPrecision = Literal["bf16", "int8_qk", "int8_qk_fp8_v", "fp8"]
MLP_ROWS = {"bf16": 65536, "int8": 32768, "fp8": 65536}
"""Default rows in the MLP at once: in int8 its activations are there in bf16 and as codes."""
INT8_MEASURED_UNTIL = 90
"""Newer compute capabilities multiply int8 as sm_80 does, in Triton; what that costs is not measured."""
GONE_ATTENTION = "fp8_qk"
"""Removed precision of attention, which older configurations and packed weights may ask for."""
_SKIP = re.compile(r"^(?P<op>[a-z]+|\*)(?::(?P<layers>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*))?$")


def default_attention(precision: str, arch: int | None = None) -> AttentionPrecision:
    """Precision of attention where none is asked for: ``"int8_qk"`` beside products of 8 bits, else ``"bf16"``.

    On the pony int8_qk costs whole clips less than 3 dB beside either (docs/decisions/0015-int8-beside-e4m3.md).

    Args:
        precision: Of the products.
        arch: Compute capability, such as 90; ``"bf16"`` from sm_100 on. None: a CPU.
    """
    return "bf16" if precision == "bf16" or (arch or 0) > INT8_MEASURED_UNTIL else "int8_qk"


@dataclass(frozen=True)
class TopK:
    """Keep the ``keep`` share of video key blocks with the highest pooled score, per key/value head and query block.

    Attributes:
        keep: Share of a row's video blocks, 0 < keep <= 1; at least one block stays.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _require_share("keep", self.keep))


@dataclass(frozen=True)
class TopP:
    """Keep the fewest video key blocks whose pooled softmax mass reaches ``mass``.

    Attributes:
        mass: 0 < mass <= 1.
    """

    mass: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", _require_share("mass", self.mass))


@dataclass(frozen=True)
class Tiles:
    """A static window around each token's place, in latent frames and token rows and columns.

    Attributes:
        frames: A video token sees frames within this distance.
        rows: And token rows within this distance.
        columns: And token columns within this distance.
    """

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        for name in ("frames", "rows", "columns"):
            object.__setattr__(self, name, require_whole(name, getattr(self, name), 0))


Sparsity = TopK | TopP | Tiles


def is_exact_step(step: int, steps: int, first: int, last: int) -> bool:
    """Whether a step (0-based) is one of the ``first`` first or the ``last`` last of a run."""
    return not first <= step < steps - last


def _require_share(name: str, value: object) -> float:
    number = real_number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """How to accelerate a model. Immutable; everything that is not exact is opt-in.

    Attributes:
        precision: Of the linear products. ``"bf16"``: the published rounding points. ``"int8"``: codes with a scale per
            token and output channel, exact sums. ``"fp8"``: e4m3 (docs/OPS.md). On a small trained model int8 keeps
            pictures 11 to 14 dB closer to float32 than e4m3; it runs on every GPU with tensor cores for it, sm_80 on,
            but is not measured on sm_100 and sm_120, where Triton takes the instructions of sm_80.
        attention: Of attention, whatever ``precision`` is: ``"bf16"``; ``"int8_qk"`` (scores of int8 codes with a scale
            per token and head of q and per 128 tokens and head of k, the weighted sum in bf16); ``"int8_qk_fp8_v"``
            (such scores, the weighted sum in e4m3); or ``"fp8"`` (all in e4m3), whose loss depends on the model and the
            length of the sequence (docs/decisions/0015-int8-beside-e4m3.md). None: :func:`default_attention`.
        sparsity: ``None``: exact: dense, and the trained window in local layers. Or a training-free policy for video
            queries; audio and text stay dense as queries and are kept as keys in every row.
        skip: Products that stay in bf16 all the same: ``"attention"``, ``"down:0-3,36-39"``, ``"*:0"``; a tuple.
        exact_first_layers: Layers at the start in which ``sparsity`` does not apply.
        exact_last_layers: Layers at the end in which it does not apply.
        exact_first_steps: Denoising steps at the start in which it does not apply. Samplers say which step a
            call is of; in a loop of your own ``at_step`` does.
        exact_last_steps: Denoising steps at the end in which it does not apply.
        backend: ``"auto"`` takes, per op, the fastest that passed its self-check on this machine; ``"triton"``,
            ``"cuda"`` and ``"reference"`` (plain torch with the kernels' rounding) are taken as they are.
        strict: With ``"auto"``: raise instead of falling back to a slower implementation.
        mlp_rows: Rows of the sequence that are in the MLP at once, a bound on memory: by default 65,536, all of a
            5 s clip at 1080p (64,256), a third of a 15 s one; in int8 32,768. ``None`` for all.
        originals: Where the unpacked weights go: ``"cpu"`` keeps them there for :func:`restore`, ``"drop"`` frees them.
    """

    precision: Precision = "bf16"
    attention: AttentionPrecision | None = None
    sparsity: Sparsity | None = None
    skip: Sequence[str] = ()
    exact_first_layers: int = 0
    exact_last_layers: int = 0
    exact_first_steps: int = 0
    exact_last_steps: int = 0
    backend: Literal["auto", "triton", "cuda", "reference"] = "auto"
    strict: bool = False
    mlp_rows: int | Literal["auto"] | None = "auto"
    originals: Literal["cpu", "drop"] = "cpu"

    def __post_init__(self) -> None:
        allowed = {
            "precision": ("bf16", "int8", "fp8"),
            "attention": get_args(AttentionPrecision),
            "backend": ("auto", "triton", "cuda", "reference"),
            "originals": ("cpu", "drop"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values and (name, self.attention) != ("attention", None):
                gone = name == "attention" and self.attention == GONE_ATTENTION
                hint = "; int8_qk is in its place" if gone else ""
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}{hint}")
        if self.sparsity is not None and not isinstance(self.sparsity, Sparsity):
            raise TypeError(f"sparsity must be None, TopK, TopP or Tiles; got {self.sparsity!r}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be True or False, got {self.strict!r}")
        for name in ("exact_first_layers", "exact_last_layers", "exact_first_steps", "exact_last_steps"):
            object.__setattr__(self, name, require_whole(name, getattr(self, name), 0))
        if self.mlp_rows not in (None, "auto"):
            rows = whole_number(self.mlp_rows)
            if rows is None or rows < 128 or rows % 128:
                raise ValueError(f'mlp_rows must be None, "auto" or a positive multiple of 128, got {self.mlp_rows!r}')
            object.__setattr__(self, "mlp_rows", rows)
        given: object = self.skip
        if not isinstance(given, (list, tuple)) or not all(isinstance(rule, str) for rule in given):
            raise TypeError(f'skip must be a list such as ["attention:0-3"], got {given!r}')
        object.__setattr__(self, "skip", tuple(given))
        for rule in self.skip:
            ops, _ = self._parse(rule)
            if all((self.attention_format if op == "attention" else self.precision) == "bf16" for op in ops):
                raise ValueError(f"skip must name products that are not in bf16 anyway, got {rule!r}")

    @classmethod
    def calibrated(cls, path: str | Path, config: ModelConfig, **options: Any) -> FastConfig:
        """``options``, and a ``skip`` of the ops that lose too much in their formats with a model's own weights.

        Args:
            path: What ``happyhorse-fast verify CHECKPOINT --calibrate N`` wrote.
            config: Configuration of the model to accelerate; the file must be of the same.
            **options: Fields of a FastConfig, at least one of ``precision`` and ``attention`` of 8 bits. Rules of
                ``skip`` among them are kept.

        Raises:
            OSError, ValueError: As :func:`happyhorse_fast.fast.calibration.read_skip`; everything is in bf16.
            TypeError, ValueError: As for a FastConfig.
        """
        wanted = cls(**options)
        if (wanted.precision, wanted.attention_format) == ("bf16", "bf16"):
            raise ValueError("precision or attention must be of 8 bits to be calibrated, got bf16 for both")
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
        wanted.require_model(config)
        lists = read_skip(path, config)
        rules: list[str] = []
        if wanted.precision != "bf16":
            rules += [rule for rule in lists[wanted.precision] if not rule.startswith("attention")]
        if wanted.attention_format != "bf16":
            # The list of all in e4m3 also serves v alone in e4m3, which loses less.
            of_attention = lists["int8" if wanted.attention_format == ATTENTION["int8"] else "fp8"]
            rules += [rule for rule in of_attention if rule.startswith("attention")]
        try:
            found = replace(wanted, skip=(*wanted.skip, *rules))
            found.require_model(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return found

    @property
    def attention_format(self) -> AttentionPrecision:
        """``attention``, or its default on a GPU where int8 was measured."""
        return self.attention or default_attention(self.precision)

    @property
    def rows_in_mlp(self) -> int | None:
        """``mlp_rows``, or its default for the precision; None for all rows."""
        return MLP_ROWS[self.precision] if self.mlp_rows == "auto" else self.mlp_rows

    def on(self, arch: int | None = None) -> FastConfig:
        """The same with its default of attention written out, for compute capability ``arch`` (None: a CPU)."""
        if self.attention is not None:
            return self
        written = copy.copy(self)  # not replace(), which would refuse to skip what the default leaves in bf16 here
        object.__setattr__(written, "attention", default_attention(self.precision, arch))
        return written

    def require_model(self, config: ModelConfig) -> None:
        """Raise a ValueError where a model cannot be accelerated so: ``skip`` names no layer of it, or its head_dim."""
        from happyhorse_fast.ops.runtime.checks import HEAD_DIMS  # here: options need no torch

        if config.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS} in an accelerated model, got {config.head_dim}")
        for rule in self.skip:
            last = max((span[-1] for span in self._parse(rule)[1] or ()), default=0)
            if last >= config.num_layers:
                raise ValueError(f"skip must name layers from 0 to {config.num_layers - 1}, got {rule!r}")

    @staticmethod
    def _parse(rule: str) -> tuple[tuple[str, ...], list[range] | None]:
        match = _SKIP.match(rule)
        if match is None or match["op"] not in (*OPS, "*"):
            raise ValueError(f'skip must hold rules such as "down", "attention:0-3,36-39" or "*:0"; got {rule!r}')
        spans = None
        if match["layers"]:
            ends = [[int(x) for x in part.split("-")] for part in match["layers"].split(",")]
            spans = [range(end[0], end[-1] + 1) for end in ends]
            if not all(spans):
                raise ValueError(f"skip must have each span's first layer before its last, got {rule!r}")
        return (OPS if match["op"] == "*" else (match["op"],)), spans

    def precision_of(self, op: str, layer: int) -> Precision | AttentionPrecision:
        """Precision of one product of one layer: one of ``precision``'s, or of ``attention``'s for attention."""
        for rule in self.skip:
            ops, spans = self._parse(rule)
            if op in ops and (spans is None or any(layer in span for span in spans)):
                return "bf16"
        return self.attention_format if op == "attention" else self.precision

    def is_sparse(self, layer: int, num_layers: int) -> bool:
        """Whether ``sparsity`` applies to a layer, at the denoising steps where it may."""
        applies = self.exact_first_layers <= layer < num_layers - self.exact_last_layers
        return self.sparsity is not None and applies
