"""LoRAs as trainers write them: key styles of peft, diffusers and kohya, with their alphas, into updates by module."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast.arguments import CheckpointError, listed
from happyhorse_fast.checkpoint.header import read_file, require_regular_file
from happyhorse_fast.eager.lora import Update

Lora = str | Path | Mapping[str, torch.Tensor]

_PEFT_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PEFT_PREFIX = "base_model.model."
_PREFIXES = (_PEFT_PREFIX, "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.", "dit.", "unet.")
_KOHYA_PREFIX = re.compile(r"^lora_(?:unet|transformer|dit|model)_")
_DOWN, _UP = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down", r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_KEY = re.compile(rf"^(?P<path>.+)\.(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:(?:\.(?P<adapter>\w+))?\.weight)?$")
_ALPHA = re.compile(r"^(?P<path>.+?)(?:\.lora)?\.alpha$")
_DORA = re.compile(r"lora_magnitude_vector|dora_scale|\.magnitude(?:\.|$)")
# What else a peft configuration can switch on that is no product of two matrices, or is one over other base weights.
_PEFT_REFUSED = (
    "use_qalora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_lora(lora: Lora, scale: float, modules: Collection[str]) -> list[Update]:
    """The updates of one LoRA, in the model's order.

    Args:
        lora: A peft folder (``adapter_model.safetensors`` and ``adapter_config.json``), a folder or file of diffusers
            (``pytorch_lora_weights.safetensors``) or kohya, or tensors by key in any of these styles. alpha comes from
            the configuration, from metadata or from ``.alpha`` tensors; where none says it, alpha is the rank.
        scale: Multiplies every update.
        modules: Paths of the model's modules that have a matrix.

    Raises:
        CheckpointError: No such file, or a damaged one.
        TypeError: ``lora`` or ``scale`` is of another type.
        ValueError: Keys that fit no module, a half of a pair, other methods than LoRA (DoRA, LoHa, ...), a rank other
            than configured, NaN or Inf. The message names the keys.
    """
    number: object = scale  # NumPy's too
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")
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
        updates.append(Update(path, down, up, float(scale) * factor, source))
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
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: corrupt configuration of a LoRA: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a LoRA's configuration must be an object, got {type(content).__name__}")
    return content


def _require_plain_lora(config: Mapping[str, Any], file: Path) -> None:
    start = str(config.get("init_lora_weights", ""))
    refused = [f"{name}={config[name]!r}" for name in _PEFT_REFUSED if config.get(name)]
    if config.get("use_dora"):
        refused = ["a DoRA (use_dora), whose magnitudes rescale the merged weight"]
    elif config.get("peft_type", "LORA") != "LORA":
        refused = [f"peft_type {config['peft_type']!r}"]
    elif config.get("bias", "none") != "none":
        refused = [f"bias={config['bias']!r}"]
    elif start.lower().startswith(_CHANGES_BASE):
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
        if _DORA.search(key):
            raise ValueError(f"{source}: {key} makes it a DoRA, which cannot be merged; only plain LoRAs can")
        half, alpha = _KEY.match(key), _ALPHA.match(key)
        match = half or alpha
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
        if half is None and value.numel() != 1:
            raise ValueError(f"{source}: {key} must be one number, got {list(value.shape)}")
        if half is not None:
            adapters.add(half["adapter"] or "")
        side = "alpha" if half is None else "down" if half["down"] else "up"
        there = found.setdefault(path, {})
        if side in there:
            raise ValueError(f"{source}: {there[side][0]} and {key} are for the same weight: merge one LoRA at a time")
        there[side] = key, value
    if foreign:
        raise ValueError(f"{source}: no keys of a LoRA ({len(foreign)}): {listed(foreign)}")
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
