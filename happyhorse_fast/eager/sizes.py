"""A model's sizes, read off the shapes of its tensors, and held against a configuration.

Each size is read off several tensors, and the value that most of them have is taken. So a single misshapen tensor is
reported as that, and not as a model of other sizes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.config import MODALITIES, ModelConfig
from happyhorse_fast.eager.model import HappyHorse

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
BANDS_KEY = "adapter.rope.bands"

# Where a reader sees a size first; {} is a layer.
_WITNESS = {
    "num_layers": "block.layers.{}.attention.pre_norm.weight",
    "hidden_size": "final_norm_video.weight",
    "head_dim": "block.layers.{}.attention.q_norm.weight",
    "num_heads_q": "block.layers.{}.attention.linear_proj.weight",
    "num_heads_kv": "block.layers.{}.attention.linear_qkv.weight",
    "video_in_channels": "adapter.video_embedder.weight",
    "audio_in_channels": "adapter.audio_embedder.weight",
    "text_in_channels": "adapter.text_embedder.weight",
    "mm_layers": "block.layers.{}.attention.pre_norm.weight",
    "gelu7_layers": "block.layers.{}.mlp.down_proj.weight",
    "post_norm_layers": "block.layers.{}.attn_post_norm.weight",
}
_POST_NORMS = ("attn_post_norm.weight", "mlp_post_norm.weight")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model or checkpoint.

    Attributes:
        key: State-dict key.
        file: The file that holds it.
        dtype: The safetensors format's name for its dtype, such as ``"BF16"``.
        shape: Its shape.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointSizes:
    """The fields of :class:`ModelConfig` that a checkpoint's tensors tell, under the same names.

    ``local_attn_layers``, ``frame_receptive_field``, ``coords_style`` and ``local_attn_min_frame_tokens`` are not among
    them: they change no tensor.
    """

    num_layers: int
    hidden_size: int
    head_dim: int
    num_heads_q: int
    num_heads_kv: int
    video_in_channels: int
    audio_in_channels: int
    text_in_channels: int
    mm_layers: tuple[int, ...]
    gelu7_layers: tuple[int, ...]
    post_norm_layers: tuple[int, ...]


def sizes_of(entries: Mapping[str, TensorSpec], path: Path) -> CheckpointSizes:
    """Sizes of a model from its tensors' shapes; every tensor's name, dtype and shape is held against them.

    Args:
        entries: The tensors by key.
        path: The checkpoint, for the messages.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, or tensors that are not floating point. The message
            names the files and keys.
    """
    sizes = _likely_sizes(entries, path)
    try:
        config = ModelConfig(**dataclasses.asdict(sizes))
    except ValueError as error:
        raise CheckpointError(f"{path}: the tensors' shapes give {sizes}, which no model has: {error}") from error
    _require_shapes(entries, path, config)
    return sizes


def require_sizes(entries: Mapping[str, TensorSpec], path: Path, config: ModelConfig, asked: str) -> None:
    """Hold a checkpoint against a configuration.

    Args:
        entries: The checkpoint's tensors.
        path: The checkpoint, for the messages.
        config: What the tensors must fit.
        asked: What the configuration is called in a message, such as ``preset 'tiny'``.

    Raises:
        CheckpointError: As :func:`sizes_of`; or another size than the configuration's, naming field, both values,
            file and key.
    """
    sizes = _likely_sizes(entries, path)
    problems = []
    for field, found in dataclasses.asdict(sizes).items():
        wanted = getattr(config, field)
        if found == wanted:
            continue
        layer = sizes.num_layers - 1 if field == "num_layers" else 0
        if isinstance(found, tuple):
            differ = [i for i in sorted({*found} ^ {*wanted}) if i < sizes.num_layers]
            if not differ:  # only in layers that the checkpoint does not have: num_layers says so
                continue
            layer = differ[0]
        key = _WITNESS[field].format(layer)
        seen = f"{key} in {entries[key].file} is {list(entries[key].shape)}" if key in entries else f"no {key}"
        problems.append(f"{field}: the checkpoint has {_plain(found)} ({seen}), {asked} says {_plain(wanted)}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {asked}:\n  " + "\n  ".join(problems))
    _require_shapes(entries, path, config)


def _plain(value: int | tuple[int, ...]) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value


def layer_of(key: str) -> int | None:
    """The layer a state-dict key belongs to, or None."""
    match key.split("."):
        case ["block", "layers", number, *_] if number.isdecimal():
            return int(number)
    return None


def _require_shapes(entries: Mapping[str, TensorSpec], path: Path, config: ModelConfig) -> None:
    expected = {key: tuple(like.shape) for key, like in HappyHorse(config, device="meta").state_dict().items()}
    misshapen = [
        f"{key} in {entry.file} is {list(entry.shape)}, must be {list(expected[key])}"
        for key, entry in entries.items()
        if entry.shape != expected[key]
    ]
    if misshapen:
        raise CheckpointError(
            f"{path}: misshapen tensors ({len(misshapen)}) beside hidden_size={config.hidden_size}, "
            f"head_dim={config.head_dim}, num_heads_q={config.num_heads_q}, num_heads_kv={config.num_heads_kv}: "
            f"{listed(misshapen)}"
        )


def _likely_sizes(entries: Mapping[str, TensorSpec], path: Path) -> CheckpointSizes:
    """Sizes by majority vote, once names and dtypes of the tensors are those of some model."""
    # A layer has more than one tensor: a layer number past their count is a stray name, not a deeper model.
    numbers = [number for key in entries if (number := layer_of(key)) is not None and number < len(entries)]
    num_layers = 1 + max(numbers, default=-1)
    post_norms = tuple(
        i for i in range(num_layers) if any(f"block.layers.{i}.{name}" in entries for name in _POST_NORMS)
    )
    # Names depend on none of the other sizes.
    named = ModelConfig(
        num_layers=max(num_layers, 1),
        hidden_size=8,
        head_dim=8,
        num_heads_q=1,
        num_heads_kv=1,
        post_norm_layers=post_norms,
    )
    expected = HappyHorse(named, device="meta").state_dict().keys()
    files = sorted({str(entry.file) for entry in entries.values()})
    kinds = {
        f"tensors missing from {listed(files)}": [key for key in expected if key not in entries and key != BANDS_KEY],
        "unexpected tensors": [f"{key} in {entry.file}" for key, entry in entries.items() if key not in expected],
        f"tensors of a dtype other than {', '.join(FLOAT_DTYPES)}": [
            f"{key} in {entry.file} is {entry.dtype}"
            for key, entry in entries.items()
            if entry.dtype not in FLOAT_DTYPES
        ],
    }
    problems = [f"{kind} ({len(found)}): {listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        raise CheckpointError(f"{path}: " + "\n  ".join(problems))
    return _Votes(entries, path).sizes(num_layers, post_norms)


class _Votes:
    """Sizes as most of the tensors have them."""

    def __init__(self, entries: Mapping[str, TensorSpec], path: Path) -> None:
        self.entries = entries
        self.path = path

    def sizes(self, num_layers: int, post_norms: tuple[int, ...]) -> CheckpointSizes:
        layers = range(num_layers)
        ends = [f"final_norm_{m}.weight" for m in MODALITIES[:2]] + [f"adapter.{m}_embedder.bias" for m in MODALITIES]
        hidden = self._most("hidden_size", [(key, self._size(key, 0, rank=1)) for key in ends])
        experts = [self._experts(layer, hidden) for layer in layers]

        def rows(layer: int, name: str, rank: int) -> int:
            """Rows per expert; 0 where they do not divide, which no size allows."""
            count, rest = divmod(self._size(f"block.layers.{layer}.{name}.weight", 0, rank), experts[layer])
            return 0 if rest else count

        norms = [(i, f"attention.{name}") for name in ("q_norm", "k_norm") for i in layers]
        head_dim = self._most("head_dim", [(f"block.layers.{i}.{name}.weight", rows(i, name, 1)) for i, name in norms])
        projections = [f"block.layers.{i}.attention.linear_proj.weight" for i in layers]
        heads_q = self._most("num_heads_q", [(k, self._size(k, 1, rank=2) // head_dim) for k in projections])
        products = [
            (f"block.layers.{i}.attention.linear_qkv.weight", rows(i, "attention.linear_qkv", 2)) for i in layers
        ]
        self._require_gates(products, heads_q, head_dim)
        heads_kv = self._most(
            "num_heads_kv", [(k, (n - heads_q * (head_dim + 1)) // (2 * head_dim)) for k, n in products]
        )
        channels = {m: f"adapter.{m}_embedder.weight" for m in MODALITIES}
        video, audio, text = (
            self._most(f"{m}_in_channels", [(key, self._size(key, 1, rank=2))]) for m, key in channels.items()
        )
        # Widths of the two kinds of MLP at this hidden size: layer 0 of GELU7, layer 1 of SwiGLU7.
        kinds = ModelConfig(
            num_layers=2, hidden_size=hidden, head_dim=8, num_heads_q=1, num_heads_kv=1, gelu7_layers=(0,)
        )
        return CheckpointSizes(
            num_layers=num_layers,
            hidden_size=hidden,
            head_dim=head_dim,
            num_heads_q=heads_q,
            num_heads_kv=heads_kv,
            video_in_channels=video,
            audio_in_channels=audio,
            text_in_channels=text,
            mm_layers=tuple(i for i in layers if experts[i] == len(MODALITIES)),
            gelu7_layers=tuple(i for i in layers if self._is_gelu7(i, kinds, rows(i, "mlp.up_gate_proj", 2))),
            post_norm_layers=post_norms,
        )

    def _require_gates(self, products: list[tuple[str, int]], heads_q: int, head_dim: int) -> None:
        """Raise where most QKV weights have rows for q, k and v and none for a gate per query head."""
        whole = 2 * head_dim
        gated = Counter((rows - heads_q * (head_dim + 1)) % whole == 0 for _, rows in products)[True]
        plain = Counter((rows - heads_q * head_dim) % whole == 0 for _, rows in products)[True]
        if plain > max(gated, len(products) // 2):
            key = products[0][0]
            raise CheckpointError(
                f"{self.path}: attention gating is off: {key} in {self.entries[key].file} is "
                f"{list(self.entries[key].shape)}, rows for q, k and v and none for a gate; only models with one gate "
                f"per query head ({heads_q} more rows per expert) can run"
            )

    def _experts(self, layer: int, hidden: int) -> int:
        names = ("attention.pre_norm", "mlp.pre_norm", "attention.linear_proj", "mlp.down_proj")
        keys = {f"block.layers.{layer}.{name}.weight": 1 if name.endswith("norm") else 2 for name in names}
        found = [(key, self._size(key, 0, rank)) for key, rank in keys.items()]
        allowed = {hidden: 1, len(MODALITIES) * hidden: len(MODALITIES)}
        return self._most(f"experts of layer {layer}", [(key, allowed.get(rows, 0)) for key, rows in found])

    def _is_gelu7(self, layer: int, kinds: ModelConfig, up_rows: int) -> bool:
        # The down projection decides, as up has equally many rows in both kinds at hidden_size 2 and 4.
        width = self._size(f"block.layers.{layer}.mlp.down_proj.weight", 1, rank=2)
        gelu7, swiglu7 = kinds.intermediate_size(0), kinds.intermediate_size(1)
        return width == gelu7 or (width != swiglu7 and up_rows == gelu7)

    def _size(self, key: str, axis: int, rank: int) -> int:
        shape = self.entries[key].shape
        return shape[axis] if len(shape) == rank else 0

    def _most(self, field: str, votes: list[tuple[str, int]]) -> int:
        count = Counter(size for _, size in votes if size > 0)
        if not count:
            shapes = [f"{key} in {self.entries[key].file} is {list(self.entries[key].shape)}" for key, _ in votes]
            raise CheckpointError(f"{self.path}: {field} cannot be read off the shapes: {listed(shapes)}")
        return count.most_common(1)[0][0]
