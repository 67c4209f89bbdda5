"""A model's sizes, read off the shapes of its tensors, and held against a configuration; its parameters, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.config import MODALITIES, ModelConfig
from happyhorse_fast.eager.model import HappyHorse, Weight

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
BANDS_KEY = "adapter.rope.bands"

WITNESS = {
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
"""The fields of :class:`ModelConfig` that tensors tell, and which tensor tells each; {} is a layer.

Not among them, since they change no tensor: ``local_attn_layers``, ``frame_receptive_field``, ``coords_style`` and
``local_attn_min_frame_tokens``.
"""
Sizes = dict[str, Any]
"""The same fields, and their values."""
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


def sizes_of(entries: Mapping[str, TensorSpec], path: Path) -> Sizes:
    """Sizes of a model from its tensors' shapes; every tensor's name, dtype and shape is held against them.

    Args:
        entries: The tensors by key.
        path: The checkpoint, for the messages.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, or tensors that are not floating point. The message
            names the files and keys.
    """
    sizes = _sizes(entries, path)
    try:
        config = ModelConfig(**sizes)
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
    sizes = _sizes(entries, path)
    problems = []
    for field, found in sizes.items():
        wanted = getattr(config, field)
        if found == wanted:
            continue
        layer = sizes["num_layers"] - 1 if field == "num_layers" else 0
        if isinstance(found, tuple):
            differ = [i for i in sorted({*found} ^ {*wanted}) if i < sizes["num_layers"]]
            if not differ:  # only in layers that the checkpoint does not have: num_layers says so
                continue
            layer = differ[0]
        key = WITNESS[field].format(layer)
        seen = _seen(entries[key]) if key in entries else f"no {key}"
        has, says = (list(value) if isinstance(value, tuple) else value for value in (found, wanted))
        problems.append(f"{field}: the checkpoint has {has} ({seen}), {asked} says {says}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {asked}:\n  " + "\n  ".join(problems))
    _require_shapes(entries, path, config)


def parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of a model; rotary frequencies are not parameters.

    Returns:
        ``total``; ``active_per_token``: those that one video token passes, one expert of three in the sandwich layers;
        ``bytes`` of the weights as published: linear ones inside layers in bf16, the others in float32.
    """
    model = HappyHorse(config, device="meta")
    total = sum(p.numel() for p in model.parameters())
    per_expert = [m for m in model.modules() if isinstance(m, Weight)]
    idle = sum(m.weight.numel() // m.experts * (m.experts - 1) for m in per_expert)
    not_for_video = (model.adapter.audio_embedder, model.adapter.text_embedder)
    for module in (*not_for_video, model.final_norm_audio, model.final_linear_audio):
        idle += sum(p.numel() for p in module.parameters())
    size = sum(p.nbytes for p in model.parameters())
    return {"total": total, "active_per_token": total - idle, "bytes": size}


def layer_of(key: str) -> int | None:
    """The layer a state-dict key belongs to, or None."""
    match key.split("."):
        case ["block", "layers", number, *_] if number.isdecimal():
            return int(number)
    return None


def skeleton(num_layers: int, post_norm_layers: Sequence[int]) -> HappyHorse:
    """A model on ``"meta"`` whose modules and tensors have the names of any with these layers.

    Names depend on none of the other sizes. It has one layer at least.
    """
    sizes: dict[str, Any] = {"hidden_size": 8, "head_dim": 8, "num_heads_q": 1, "num_heads_kv": 1}
    config = ModelConfig(num_layers=max(num_layers, 1), post_norm_layers=post_norm_layers, **sizes)
    return HappyHorse(config, device="meta")


def _require_shapes(entries: Mapping[str, TensorSpec], path: Path, config: ModelConfig) -> None:
    expected = {key: tuple(like.shape) for key, like in HappyHorse(config, device="meta").state_dict().items()}
    misshapen = [
        f"{_seen(entry)}, must be {list(expected[key])}"
        for key, entry in entries.items()
        if entry.shape != expected[key]
    ]
    if misshapen:
        raise CheckpointError(
            f"{path}: misshapen tensors ({len(misshapen)}) beside hidden_size={config.hidden_size}, "
            f"head_dim={config.head_dim}, num_heads_q={config.num_heads_q}, num_heads_kv={config.num_heads_kv}: "
            f"{listed(misshapen)}"
        )


def _sizes(entries: Mapping[str, TensorSpec], path: Path) -> Sizes:
    """Sizes, once names and dtypes of the tensors are those of some model."""
    # A layer has more than one tensor: a layer number past their count is a stray name, not a deeper model.
    numbers = [number for key in entries if (number := layer_of(key)) is not None and number < len(entries)]
    num_layers = 1 + max(numbers, default=-1)
    post_norms = tuple(
        i for i in range(num_layers) if any(f"block.layers.{i}.{name}" in entries for name in _POST_NORMS)
    )
    expected = skeleton(num_layers, post_norms).state_dict().keys()
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
    return _read_sizes(entries, path, num_layers, post_norms)


def _read_sizes(entries: Mapping[str, TensorSpec], path: Path, num_layers: int, post_norms: tuple[int, ...]) -> Sizes:
    """Sizes as the tensors of :data:`WITNESS` have them, those of all layers as the first has them."""

    def size(field: str, axis: int, rank: int, layer: int = 0) -> int:
        entry = entries[WITNESS[field].format(layer)]
        if len(entry.shape) != rank:
            raise CheckpointError(f"{path}: {field} cannot be read off the shapes: {_seen(entry)}")
        return entry.shape[axis]

    layers, hidden = range(num_layers), size("hidden_size", 0, rank=1)
    # Nearer to three experts than to one, to GELU7's width of 4 than to SwiGLU7's of 8/3: so a misshapen tensor is told
    # as that.
    mm_layers = tuple(i for i in layers if size("mm_layers", 0, 1, i) > 2 * hidden)
    gelu7_layers = tuple(i for i in layers if 3 * size("gelu7_layers", 1, 2, i) > 10 * hidden)
    experts = len(MODALITIES) if 0 in mm_layers else 1
    head_dim = max(1, size("head_dim", 0, rank=1) // experts)
    heads_q = size("num_heads_q", 1, rank=2) // head_dim
    of_kv = size("num_heads_kv", 0, rank=2) // experts - heads_q * (head_dim + 1)
    if of_kv % (2 * head_dim) and (of_kv + heads_q) % (2 * head_dim) == 0:
        entry = entries[WITNESS["num_heads_kv"].format(0)]
        raise CheckpointError(
            f"{path}: attention gating is off: {_seen(entry)}, rows for q, k and v and none for a gate; only models "
            f"with one gate per query head ({heads_q} more rows per expert) can run"
        )
    return Sizes(
        num_layers=num_layers,
        hidden_size=hidden,
        head_dim=head_dim,
        num_heads_q=heads_q,
        num_heads_kv=of_kv // (2 * head_dim),
        video_in_channels=size("video_in_channels", 1, rank=2),
        audio_in_channels=size("audio_in_channels", 1, rank=2),
        text_in_channels=size("text_in_channels", 1, rank=2),
        mm_layers=mm_layers,
        gelu7_layers=gelu7_layers,
        post_norm_layers=post_norms,
    )


def _seen(entry: TensorSpec) -> str:
    return f"{entry.key} in {entry.file} is {list(entry.shape)}"
