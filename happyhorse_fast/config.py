"""The model's configuration: sizes, which layer is of which kind, and the published presets.

Source of every number: the public description of the architecture (docs/DESIGN.md, "The model").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from happyhorse_fast.arguments import require_choice, require_whole, whole_number

CoordsStyle = Literal["v1", "v2"]

LATENT_CHANNELS = 48
"""Channels of the video VAE's latent."""
PATCH = (1, 2, 2)
"""Latent positions (frames, rows, columns) that make one video token."""
OPS = ("qkv", "attention", "proj", "up", "down")
"""The products of a layer whose precision can be chosen, in order."""
MODALITIES = ("video", "audio", "text")
"""The order of the three experts in a sandwich layer's weights, and of the tokens in the sequence."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and layer kinds of one model. Immutable and validated on construction.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        head_dim: Channels per attention head; a multiple of 8, since the rotary embedding has head_dim / 8 bands.
        num_heads_q: Query heads.
        num_heads_kv: Key/value heads; divides ``num_heads_q``.
        video_in_channels: Channels of a video token: latent channels x 1 x 2 x 2.
        audio_in_channels: Channels of an audio token.
        text_in_channels: Channels of a text token, as the text encoder gives them.
        mm_layers: Sandwich layers, with one expert per modality in every weight.
        local_attn_layers: Layers whose video tokens see only a window of frames.
        gelu7_layers: Layers whose MLP is GELU7 at 4x width; the others are SwiGLU7.
        post_norm_layers: Layers that normalise a branch's output before the residual add.
        frame_receptive_field: R: a video token of latent frame f sees frames f-R..f+R in a local layer.
        coords_style: ``"v2"`` (base, distilled) or ``"v1"`` (super-resolution): where audio and text are in time.
        local_attn_min_frame_tokens: The window applies only to clips with at least this many tokens per latent
            frame; smaller clips are dense in every layer. 0: always.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range; the message names it, what came and what is allowed.
    """

    num_layers: int
    hidden_size: int
    head_dim: int
    num_heads_q: int
    num_heads_kv: int
    video_in_channels: int = 192
    audio_in_channels: int = 64
    text_in_channels: int = 3584
    mm_layers: Sequence[int] = field(default=())
    local_attn_layers: Sequence[int] = field(default=())
    gelu7_layers: Sequence[int] = field(default=())
    post_norm_layers: Sequence[int] = field(default=())
    frame_receptive_field: int = 11
    coords_style: CoordsStyle = "v2"
    local_attn_min_frame_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("mm_layers", "local_attn_layers", "gelu7_layers", "post_norm_layers"):
            object.__setattr__(self, name, self._layer_list(name))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int":
                least = 0 if f.name in ("frame_receptive_field", "local_attn_min_frame_tokens") else 1
                object.__setattr__(self, f.name, require_whole(f.name, value, least))
        if self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8 (head_dim / 8 rotary bands), got {self.head_dim}")
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                f"num_heads_kv must divide num_heads_q, got num_heads_kv={self.num_heads_kv} "
                f"and num_heads_q={self.num_heads_q}"
            )
        patch = PATCH[0] * PATCH[1] * PATCH[2]
        if self.video_in_channels % patch:
            raise ValueError(
                f"video_in_channels must be a multiple of {patch} (latent channels x a 1x2x2 patch), "
                f"got {self.video_in_channels}"
            )
        if self.coords_style not in ("v1", "v2"):
            raise ValueError(f'coords_style must be "v1" or "v2", got {self.coords_style!r}')

    def _layer_list(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} must be a list of layer numbers, got {value!r}")
        layers = tuple(require_whole(f"{name}[...]", layer, 0) for layer in value)
        count = whole_number(self.num_layers)
        for layer in layers:
            if count is not None and layer >= count:
                raise ValueError(f"{name} names layer {layer}, but there are num_layers={self.num_layers} (0-based)")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} names a layer twice: {list(layers)}")
        return tuple(sorted(layers))

    # Derived sizes -------------------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """C of a video latent [1, C, T, H, W]."""
        return self.video_in_channels // (PATCH[0] * PATCH[1] * PATCH[2])

    @property
    def qkv_features(self) -> int:
        """Rows of ``linear_qkv`` per expert: q, k, v and one gate per query head."""
        return (self.num_heads_q + 2 * self.num_heads_kv) * self.head_dim + self.num_heads_q

    def experts(self, layer: int) -> int:
        """3 (video, audio, text) in a sandwich layer, 1 elsewhere."""
        return len(MODALITIES) if layer in self.mm_layers else 1

    def intermediate_size(self, layer: int) -> int:
        """Width of the MLP after its activation."""
        if layer in self.gelu7_layers:
            return 4 * self.hidden_size
        return int(self.hidden_size * 4 * 2 / 3) // 4 * 4

    def up_features(self, layer: int) -> int:
        """Rows of ``up_gate_proj`` per expert: gate and linear interleaved for SwiGLU7."""
        return self.intermediate_size(layer) * (1 if layer in self.gelu7_layers else 2)

    def is_local(self, layer: int, frame_tokens: int) -> bool:
        """Whether ``layer`` uses the frame window on a clip with ``frame_tokens`` tokens per latent frame."""
        return layer in self.local_attn_layers and frame_tokens >= self.local_attn_min_frame_tokens

    def require_ranks(self, ranks: int) -> None:
        """Raise a ValueError where a number of ranks does not divide the key/value heads, which are not split."""
        if self.num_heads_kv % ranks:
            fitting = [n for n in range(1, self.num_heads_kv + 1) if self.num_heads_kv % n == 0]
            raise ValueError(
                f"a sequence can be shared by a number of ranks that divides the {self.num_heads_kv} key/value heads "
                f"({', '.join(map(str, fitting))}), got {ranks}"
            )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``ModelConfig(**d)`` takes it back; lists instead of tuples, so JSON round-trips."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names that :meth:`preset` takes."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published configuration by name.

        ``happyhorse-1.0-15b``: the size HappyHorse-1.0 is described with. Its masks are not published; an assumption
        stands in: at 1080p the public 1080p model's window, below that dense. ``happyhorse-1.0-15b-dense``: the same
        without a window. ``davinci-magihuman``, ``davinci-magihuman-sr-540p``, ``davinci-magihuman-sr-1080p``: the
        public checkpoints' settings. ``tiny``: a small model of the same shape, for demonstrations and tests.

        Raises:
            ValueError: No such preset; the message lists those there are.
        """
        require_choice("preset", name, _PRESETS)
        return cls(**_PRESETS[name])


_FULL: dict[str, Any] = {
    "num_layers": 40,
    "hidden_size": 5120,
    "head_dim": 128,
    "num_heads_q": 40,
    "num_heads_kv": 8,
    "mm_layers": (0, 1, 2, 3, 36, 37, 38, 39),
    "gelu7_layers": (0, 1, 2, 3),
}
# The 1080p checkpoint is trained with the window in all layers but every fourth of the first 32.
_WINDOW: dict[str, Any] = {
    "local_attn_layers": tuple(i for i in range(40) if i not in (3, 7, 11, 15, 19, 23, 27, 31)),
    "frame_receptive_field": 11,
}
_PRESETS: dict[str, dict[str, Any]] = {
    # 34 x 34 tokens is the smallest 1080p frame (1:1); the largest 540p frame has 16 x 28 = 448.
    "happyhorse-1.0-15b": _FULL | _WINDOW | {"local_attn_min_frame_tokens": 34 * 34},
    "happyhorse-1.0-15b-dense": _FULL,
    "davinci-magihuman": _FULL,
    "davinci-magihuman-sr-540p": _FULL | {"coords_style": "v1"},
    "davinci-magihuman-sr-1080p": _FULL | _WINDOW | {"coords_style": "v1"},
    "tiny": {
        "num_layers": 6,
        "hidden_size": 320,
        "head_dim": 64,
        "num_heads_q": 5,
        "num_heads_kv": 1,
        "text_in_channels": 96,
        "mm_layers": (0, 5),
        "gelu7_layers": (0,),
        "local_attn_layers": (0, 1, 2, 4, 5),
        "frame_receptive_field": 2,
    },
}
