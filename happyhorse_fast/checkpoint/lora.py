"""LoRAs as trainers write them, in the styles of peft, diffusers and kohya, merged into a model's weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from happyhorse_fast.arguments import CheckpointError, listed, require_number
from happyhorse_fast.checkpoint.header import parse_json, read_file, require_regular_file
from happyhorse_fast.eager.lora import Update, merge
from happyhorse_fast.fast.refusals import require_unwrapped, require_whole_weights
from happyhorse_fast.fast.state import is_accelerated

Model = TypeVar("Model", bound=nn.Module)
Lora = str | Path | Mapping[str, torch.Tensor]

_PEFT_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PEFT_PREFIX = "base_model.model."
_PREFIXES = (_PEFT_PREFIX, "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.", "dit.", "unet.")
_KOHYA_PREFIX = re.compile(r"^lora_(?:unet|transformer|dit|model)_")
_DOWN, _UP = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down", r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_HALF = rf"(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:(?:\.(?P<adapter>\w+))?\.weight)?"
_KEY = re.compile(rf"^(?P<path>.+?)\.(?:{_HALF}|(?:lora\.)?(?P<alpha>alpha))$")
# What else a peft configuration can switch on that is no product of two matrices, or is one over other base weights.
_PEFT_PLAIN = {"peft_type": "LORA", "bias": "none"}
_PEFT_REFUSED = (
    "use_dora",
    "use_qalora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def merge_lora(model: Model, lora: Lora | Sequence[Lora], scale: float | Sequence[float] = 1.0) -> Model:
    """Add LoRAs to a model's weights, in place, before it is accelerated.

    A weight becomes W + scale * alpha / r * (up @ down), in float32, rounded once to its dtype. Several LoRAs are added
    in order, in one call or in several: every weight is made anew from the original and all of them, and rounded once.
    ``restore(model)`` takes them all out, also after ``accelerate(model)``. The original weights are kept on the CPU
    for that (30 GB where a 15B model is merged whole), and freed with its layers by ``FastConfig(originals="drop")``.

    Args:
        model: A :class:`HappyHorse` or a model object of the public implementation, not accelerated.
        lora: A folder or ``.safetensors`` file, or tensors by key, in the style of peft
            (``base_model.model.<path>.lora_A.weight``, with ``adapter_config.json``), diffusers
            (``transformer.<path>.lora_A.weight`` or ``.lora.down.weight``) or kohya
            (``lora_unet_<path>.lora_down.weight``). ``<path>`` is a module with a matrix, such as
            ``block.layers.0.attention.linear_qkv``; up is [out features, r], of three experts [3 * out features, r].
            Where nothing says alpha, it is the rank, and ``scale`` the whole factor. Or a list of such.
        scale: Strength; may be negative. Of several, one for all or one each.

    Returns:
        ``model`` itself. On any error its weights are what they were.

    Raises:
        CheckpointError: A file is missing or damaged.
        TypeError: ``model`` is no module or wraps one; ``lora`` or ``scale`` is of another type.
        ValueError: The model is accelerated; keys that fit no module, shapes or ranks that do not fit, methods other
            than LoRA, NaN or Inf, or weights changed since an earlier merge. The message names the keys.
    """
    require_unwrapped(model)
    if is_accelerated(model):
        raise ValueError(
            "model must not be accelerated, its weights are packed: call restore(model) (which takes out LoRAs merged "
            "before), merge_lora, then accelerate(model); or load(..., lora=...)"
        )
    require_whole_weights(model)
    updates = plan_updates(model, lora, scale)
    if meta := next((path for path in updates if model.get_submodule(path).weight.is_meta), None):
        raise ValueError(f"model must hold data, {meta}.weight is on the meta device")
    merge(model, updates)
    return model


def plan_updates(
    model: nn.Module, lora: Lora | Sequence[Lora], scale: float | Sequence[float]
) -> dict[str, list[Update]]:
    """The updates of LoRAs by module path, held against the model's shapes; the model may be on ``"meta"``.

    Raises:
        CheckpointError, TypeError, ValueError: As :func:`merge_lora`.
    """
    found = {path: _matrix(module) for path, module in model.named_modules() if path}
    weights = {path: weight for path, weight in found.items() if weight is not None}
    count = Counter(map(id, weights.values()))
    updates: dict[str, list[Update]] = {}
    loras: list[Any] = list(lora) if isinstance(lora, list | tuple) else [lora]
    scales: list[Any] = list(scale) if isinstance(scale, list | tuple) else [scale] * len(loras)
    if len(scales) != len(loras):
        raise ValueError(f"scale must be one number or one for each of the {len(loras)} LoRAs, got {len(scales)}")
    for one, strength in zip(loras, scales, strict=True):
        for update in _read_lora(one, strength, weights):
            weight = weights[update.path]
            if count[id(weight)] > 1:
                raise ValueError(f"{update.source}: {update.path}.weight is tied to another module's: untie it first")
            if (update.up.shape[0], update.down.shape[1]) != weight.shape:
                raise ValueError(
                    f"{update.source}: the LoRA for {update.path} must be for [out, in] features "
                    f"{list(weight.shape)}, got {[update.up.shape[0], update.down.shape[1]]}"
                )
            updates.setdefault(update.path, []).append(update)
    return updates


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """A module's weight, where a LoRA can be for it and it is a parameter of its own."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and not parametrize.is_parametrized(module) else None


def _read_lora(lora: Lora, scale: float, modules: Collection[str]) -> list[Update]:
    """The updates of one LoRA, in the model's order; ``modules`` are the paths of those that have a matrix."""
    strength = require_number("scale", scale, "finite", math.isfinite)
    if isinstance(lora, Mapping):
        tensors, config, source = lora, None, "lora"
    elif isinstance(lora, str | Path):
        tensors, config, source = _read(Path(lora))
    else:
        raise TypeError(f"lora must be a folder, a file or tensors by key, got {type(lora).__name__}")
    found = _parts(tensors, modules, source)
    updates = []
    for path in (path for path in modules if path in found):
        (key, down), (_, up) = found[path]["down"], found[path]["up"]
        rank = down.shape[0] if down.dim() == 2 else 0
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != rank or not rank:
            raise ValueError(
                f"{source}: {key} must be [rank, in features] and its other half [out features, rank], got "
                f"{list(down.shape)} and {list(up.shape)}"
            )
        if "alpha" in found[path]:
            factor = float(found[path]["alpha"][1]) / rank
        elif config is not None:
            factor = _configured(config, path, rank, key, source)
        elif isinstance(lora, Mapping) or not key.startswith(_PEFT_PREFIX):
            factor = 1.0
        else:
            raise ValueError(f"{source}: alpha is not known, {_PEFT_CONFIG} is missing beside it")
        # Copies: a trainer goes on with its tensors, and an earlier LoRA is added again beside a later one.
        down, up = (half.detach().to("cpu", copy=True) for half in (down, up))
        updates.append(Update(path, down, up, strength * factor, source))
    return updates


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, str]:
    """Tensors, peft's configuration where there is one, and the file's name."""
    from safetensors import safe_open

    file = _file_of(path)
    read_file(file)  # for its messages
    with safe_open(file, framework="pt", device="cpu") as stream:
        metadata = stream.metadata() or {}
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118, is no dict
    config = None
    beside = file.parent / _PEFT_CONFIG
    if beside.exists() and file.name == _FILES[0]:
        require_regular_file(beside)
        config = _parsed(beside.read_text(), beside)
    elif "lora_adapter_metadata" in metadata:
        packed = _parsed(metadata["lora_adapter_metadata"], file)
        ours = {key: value for key, value in packed.items() if key[: key.rfind(".") + 1] in ("", *_PREFIXES)}
        config = {key.rpartition(".")[2]: value for key, value in ours.items()}
        config = config if "lora_alpha" in config else None
    if config is not None:
        _require_plain_lora(config, file)
    return tensors, config, str(file)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != ".safetensors" and path.exists():
            raise CheckpointError(f"{path}: a LoRA is a folder or a .safetensors file")
        return path
    there = sorted(entry.name for entry in path.glob("*.safetensors"))
    named = [name for name in _FILES if name in there] or there
    if len(named) != 1:
        found = listed(named) if named else "no .safetensors file"
        raise CheckpointError(f"{path}: must hold one LoRA ({' or '.join(_FILES)}), it holds {found}: name the file")
    return path / named[0]


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: corrupt configuration of a LoRA: {error}") from error


def _require_plain_lora(config: Mapping[str, Any], file: Path) -> None:
    start = str(config.get("init_lora_weights", ""))
    refused = [f"{name}={config[name]!r}" for name in _PEFT_REFUSED if config.get(name)]
    refused += [f"{name}={config[name]!r}" for name, plain in _PEFT_PLAIN.items() if config.get(name, plain) != plain]
    if start.lower().startswith(_CHANGES_BASE):
        refused += [f"init_lora_weights={start!r}, which was trained over changed base weights (peft can convert it)"]
    if refused:
        raise ValueError(f"{file}: {refused[0]}, which cannot be merged; only plain LoRAs can")


def _configured(config: Mapping[str, Any], path: str, rank: int, key: str, source: str) -> float:
    """alpha / r as peft's configuration has it for one module."""

    def of(patterns: str, default: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
                return float(value)
        return float(config[default])

    try:
        alpha, r = of("alpha_pattern", "lora_alpha"), of("rank_pattern", "r")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: its configuration must have numbers r and lora_alpha: {error!r}") from error
    if r != rank:
        raise ValueError(f"{source}: {key} is of rank {rank}, its configuration says {r:g}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _parts(
    tensors: Mapping[str, torch.Tensor], modules: Collection[str], source: str
) -> dict[str, dict[str, tuple[str, torch.Tensor]]]:
    """(key, tensor) of ``"down"``, ``"up"`` and, where it is there, ``"alpha"`` by module path."""
    underscored: dict[str, list[str]] = {}
    for path in modules:
        underscored.setdefault(path.replace(".", "_"), []).append(path)
    found: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    adapters: set[str] = set()
    unmatched, foreign = [], []
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"{source} must map keys to tensors, got {key!r}: {type(value).__name__}")
        match = _KEY.match(key)
        if match is None:
            foreign.append(key)
            continue
        path = _module(match["path"], modules, underscored)
        if not path:
            unmatched.append(key)
            continue
        if value.is_meta or not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
            what = "on meta" if value.is_meta else f"{value.dtype}" if not value.is_floating_point() else "NaN or Inf"
            raise ValueError(f"{source}: {key} must hold finite floating-point numbers, got {what}")
        side = next(side for side in ("down", "up", "alpha") if match[side])
        if side != "alpha":
            adapters.add(match["adapter"] or "")
        elif value.numel() != 1:
            raise ValueError(f"{source}: {key} must be one number, got {list(value.shape)}")
        there = found.setdefault(path, {})
        if side in there:
            raise ValueError(f"{source}: {there[side][0]} and {key} are for the same weight: merge one LoRA at a time")
        there[side] = key, value
    if foreign:
        raise ValueError(
            f"{source}: only plain LoRAs can be merged; no keys of one ({len(foreign)}): {listed(foreign)}"
        )
    if unmatched:
        raise ValueError(
            f"{source}: keys of modules that the model does not have ({len(unmatched)}): {listed(unmatched)}. It has, "
            f"for example, {listed(list(modules)[:3])}"
        )
    if not found:
        raise ValueError(f"{source} must hold a LoRA, got {len(tensors)} tensors and no pair among them")
    if len(adapters) > 1:
        raise ValueError(f"{source}: several adapters ({listed(sorted(adapters))}): merge one LoRA at a time")
    halves = [key for there in found.values() if not {"down", "up"} <= there.keys() for key, _ in there.values()]
    if halves:
        raise ValueError(f"{source}: no other half for {listed(halves)}")
    return found


def _module(name: str, modules: Collection[str], underscored: Mapping[str, list[str]]) -> str:
    """The module that a key names, "" for none."""
    while name not in modules:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            paths = underscored.get(_KOHYA_PREFIX.sub("", name), []) if "." not in name else []
            return paths[0] if len(paths) == 1 else ""
        name = name.removeprefix(prefix)
    return name
