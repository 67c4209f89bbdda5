"""Refuse models with additions, such as hooks, that packed layers would silently leave out."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize

from happyhorse_fast.arguments import listed
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sizes import layer_of, skeleton
from happyhorse_fast.fast.compiled import published_key, unwrapped
from happyhorse_fast.fast.config import FastConfig, Tiles
from happyhorse_fast.fast.layer import FastLayer

PRODUCTS = ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_FORWARD = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
_BACKWARD = {"_backward_hooks": "backward hook", "_backward_pre_hooks": "backward pre-hook"}
_STATE = {"_state_dict_hooks": "state-dict hook", "_state_dict_pre_hooks": "state-dict pre-hook"}
# Methods of a model that no forward pass calls.
_BESIDE_FORWARD = {"init_weights", "reset_parameters", "extra_repr"}
_SPLIT = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
_WHOLE = "happyhorse_fast runs whole models, one GPU each: give every process a model of its own, not split or wrapped"


def require_acceleratable(model: nn.Module, fast: FastConfig) -> None:
    """Raise where a model's own forward pass does something that packed layers would not.

    What the whole model carries and what still works stays: forward hooks and pre-hooks on ``model`` itself, layers
    that share weights with each other, changed rotary frequencies.

    Args:
        model: About to be accelerated.
        fast: How.

    Raises:
        TypeError: ``model`` wraps another (DistributedDataParallel, FullyShardedDataParallel, PeftModel, ...).
        ValueError: Hooks below the model, or backward or global ones; a forward pass of a subclass's or an instance's
            own; parametrised weights; replaced or added submodules, parameters or buffers; sharded, quantised or
            outward tied weights, or of a dtype that they are not published in; attention without a gate; context
            parallelism; ``Tiles`` for the public implementation. The message names modules and kinds.
    """
    require_unwrapped(model)
    require_one_rank(model)
    require_whole_weights(model)
    if isinstance(fast.sparsity, Tiles) and not isinstance(model, HappyHorse):
        raise ValueError(
            "sparsity must be TopK or TopP for a model object of the public implementation, whose forward is not told "
            "how many columns a frame has; got Tiles. A HappyHorse of the same checkpoint (load) takes it"
        )
    ours = isinstance(model, HappyHorse)
    # Of a HappyHorse also the sizes; those of the public implementation are read off its weights.
    count = max(1, len(model.block.layers))  # type: ignore[union-attr,arg-type]
    twin = HappyHorse(model.config, device="meta") if isinstance(model, HappyHorse) else skeleton(count, range(count))
    likes = dict(twin.named_modules())
    every = {f"_global{name}": f"global {kind} of every module" for name, kind in (_FORWARD | _BACKWARD).items()}
    problems = [*_hooks(global_hooks, every), *_outward_ties(model)]
    classes: dict[tuple[str, int], tuple[str, type]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if unwrapped(module) is module:  # what torch.compile wraps comes by itself
            key = published_key(path)
            found = _additions(key, module, likes.get(key), ours, classes)
            problems += [f"{key or 'model'}: {problem}" for problem in found]
    if problems := problems or (list(_differences(model, twin)) if ours else []):
        raise ValueError(
            f"model must not carry what packed layers leave out ({len(problems)}): {listed(problems)}. Remove it "
            "before accelerate: merge LoRAs with merge_lora, bake parametrised weights in (remove_parametrizations), "
            "put code around the model in place of hooks inside it"
        )
    published = {key: like.dtype for key, like in twin.state_dict().items()}
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        name = published_key(key)
        allowed = list(dict.fromkeys((published.get(name, torch.float32), torch.float32)))  # as published, as trained
        if tensor.dtype not in allowed:
            raise ValueError(
                f"model must have {name} in {' or '.join(map(str, allowed))} to be accelerated, got {tensor.dtype}: "
                "load the checkpoint again instead of .half(), .bfloat16(), .double() or .to(dtype), which round what "
                "is published in float32"
            )


def require_running(model: nn.Module) -> None:
    """Raise where something was attached to parts of an accelerated model that its forward pass does not run.

    Forward hooks on the whole model and on packed layers do run. Takes 0.1 ms for 40 layers; not under torch.compile,
    whose graph holds no such check.

    Raises:
        ValueError: Hooks on parts that do not run, backward hooks, replaced parts; context parallelism. The message
            names them.
    """
    require_one_rank(model)
    parts: Any = model
    embedders = (parts.adapter.video_embedder, parts.adapter.audio_embedder, parts.adapter.text_embedder)
    linears = (*embedders, parts.final_linear_video, parts.final_linear_audio)
    kinds = [(linears, nn.Linear), (parts.block.layers, FastLayer)]
    for module in (module for modules, kind in kinds for module in modules if not _is_a(unwrapped(module), kind)):
        raise ValueError(
            f"{_path_of(model, module)} was replaced after accelerate, is a {type(module).__qualname__}: call "
            "restore(model), replace it, then accelerate(model), which says whether it can be kept"
        )
    left: list[nn.Module | None] = [model, *parts.fast.originals]
    while left:
        module = left.pop()
        if module is None:
            continue
        left += module._modules.values()
        runs = module is model or _is_a(module, FastLayer)
        hooks = module._backward_hooks or module._backward_pre_hooks
        own = False
        if not runs:
            hooks = hooks or module._forward_hooks or module._forward_pre_hooks
            # torch.compile's wrapper has a forward of its own.
            own = "forward" in vars(module) and module is not parts.block and unwrapped(module) is module
        if hooks or (own and _is_overridden(module, "forward", vars(module)["forward"], "part")):
            what = f"a hook ({', '.join(map(_called, hooks.values()))})" if hooks else "a forward of its own"
            raise ValueError(
                f"{_path_of(model, module)} got {what} after accelerate, which does not run: remove it, or call "
                "restore(model) first. Forward hooks on the whole model and on block.layers.N run, and on_layer sees "
                "the residual stream after every layer"
            )


def _is_a(module: nn.Module, kind: type) -> bool:
    """Of exactly this class, or of the one that FSDP2 makes of it."""
    there = type(module)
    return there is kind or there.__bases__[1:] == (kind,)


def _path_of(model: nn.Module, module: nn.Module) -> str:
    originals = nn.ModuleList(model.fast.originals)  # type: ignore[union-attr,arg-type]
    every = chain(model.named_modules(), originals.named_modules(prefix="block.layers"))
    return next(path for path, other in every if other is module) or "model"


def require_one_rank(model: nn.Module) -> None:
    """Raise where the public implementation splits the sequence over ranks: every one would compute all of it.

    Raises:
        ValueError: Its context-parallel group has more than one rank.
    """
    if isinstance(model, HappyHorse):
        return
    # Where the public implementation (inference.infra.distributed), or a copy of it, would ask.
    scopes: list[dict[str, Any]] = []
    for kind in type(model).__mro__:
        scope = getattr(inspect.unwrap(vars(kind).get("forward", object)), "__globals__", {})
        scopes += [scope, getattr(scope.get("ulysses_scheduler"), "__globals__", {})]
    published = ("inference.infra.distributed", "inference.infra.distributed.parallel_state")
    scopes += [vars(sys.modules[name]) for name in published if name in sys.modules]
    ranks = 1
    for size in (scope.get("get_cp_world_size") for scope in scopes):
        # It asserts where torch.distributed is up and the public implementation's groups are not made.
        with contextlib.suppress(AssertionError):
            ranks = max(ranks, int(size())) if callable(size) else ranks
    if ranks > 1:
        raise ValueError(
            f"context parallelism must be off (cp_size=1), got a group of {ranks} ranks: every rank of an accelerated "
            "model would compute all rows. Take cp_size=1, accelerate, then happyhorse_fast.parallelize(model, mesh)"
        )


def _names(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__]


def _is_model(model: object) -> bool:
    return isinstance(model, HappyHorse) or hasattr(getattr(model, "block", None), "layers")


def require_unwrapped(model: object) -> None:
    """Raise a TypeError where a model wraps another (DistributedDataParallel, PeftModel, ...), or is none."""
    must = "model must be a HappyHorse or a model object of the public implementation"
    inside = model._modules if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    wrapped = [name for name, value in inside.items() if _is_model(value)]
    if wrapped and not isinstance(model, HappyHorse):  # some find attributes of what they wrap
        names = _names(type(model))
        inner = "base_model.model" if "PeftModel" in names else wrapped[0]
        what = f"pass what it wraps, model.{inner}" if set(names).isdisjoint(_SPLIT) else _WHOLE
        raise TypeError(f"{must}, got {type(model).__name__} around one: {what}")
    if not isinstance(model, nn.Module) or not _is_model(model):
        raise TypeError(f"{must} (adapter, block.layers, final_norm_video, ...), got {type(model).__name__}")


def require_whole_weights(model: nn.Module) -> None:
    """Raise a ValueError where weights are sharded or quantised."""
    for path, module in model.named_modules():
        if split := [name for name in _SPLIT if name in _names(type(module))]:
            raise ValueError(f"model must not be sharded, {path or 'model'} is a {split[0]}: {_WHOLE}")
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if "DTensor" in _names(type(value.data)):
            raise ValueError(f"model must not be sharded, {key} is a DTensor: {_WHOLE}")
        if hasattr(value, "ds_id"):
            raise ValueError(f"model must not be sharded, {key} is a parameter of DeepSpeed's ZeRO-3: {_WHOLE}")
        if getattr(value, "tensor_model_parallel", False):
            raise ValueError(f"model must not be sharded, {key} is split by tensor parallelism: {_WHOLE}")
        if type(value.data) not in (torch.Tensor, FakeTensor) or value.dtype not in _FLOATS:
            what = type(value.data).__name__ if type(value.data) is not torch.Tensor else str(value.dtype)
            raise ValueError(
                f"model must hold bfloat16, float16, float32 or float64 weights, {key} is {what}: "
                "accelerate quantises by itself (FastConfig), from the unquantised weights"
            )


def _hooks(holder: Any, attributes: Mapping[str, str]) -> Iterator[str]:
    for attribute, kind in attributes.items():
        for hook in getattr(holder, attribute).values():
            yield f"{kind} ({_called(hook)})"


def _outward_ties(model: nn.Module) -> Iterator[str]:
    named = list(model.named_parameters(remove_duplicate=False))
    outside = {id(value): key for key, value in named if layer_of(key) is None}
    for key, value in named:
        if layer_of(key) is not None and id(value) in outside:
            yield f"{key}: tied to {outside[id(value)]}, which stays as it is where the layer is packed"


def _differences(model: nn.Module, twin: HappyHorse) -> Iterator[str]:
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    there = {published_key(key): value for key, value in named}
    for key, like in twin.state_dict().items():
        if key not in there:
            yield f"{key}: is missing"
        elif there[key].shape != like.shape:
            yield f"{key}: is {list(there[key].shape)}, its configuration makes it {list(like.shape)}"


def _additions(
    path: str,
    module: nn.Module,
    like: nn.Module | None,
    ours: bool,
    classes: dict[tuple[str, int], tuple[str, type]],
) -> Iterator[str]:
    """Describe the additions of one module, and what differs from its twin ``like``, that packed layers leave out."""
    role, kind = path.rpartition(".")[2], type(module)
    yield from _hooks(module, _BACKWARD | (_FORWARD if path else {}) | (_STATE if layer_of(path) is not None else {}))
    if parametrize.is_parametrized(module):
        yield f"parametrised ({', '.join(module.parametrizations)})"  # type: ignore[arg-type]
        return  # its class, children and tensors follow from that
    if ".parametrizations" in path:
        return
    if role == "attention" and getattr(getattr(module, "config", None), "enable_attn_gating", True) is False:
        yield (
            "attention gating is off (enable_attn_gating=False), the kernels have one gate per query head: only models "
            "with it can be accelerated"
        )
    for attribute, value in vars(module).items():
        if _is_overridden(module, attribute, value, path):
            yield f"{attribute} is replaced on the instance ({_called(value)})"
    overriding = _overriding(kind)
    if isinstance(like, nn.Linear) and kind is not nn.Linear:
        yield f"replaced, is a {kind.__module__}.{kind.__qualname__} in the place of a torch.nn.Linear"
    elif overriding:
        yield f"a subclass's own {overriding[1]} ({overriding[0].__qualname__})"
    elif ours and like is not None and not isinstance(module, type(like)):
        yield f"replaced, is a {kind.__qualname__} in the place of {type(like).__name__}"
    else:
        # The public implementation's classes may be anyone's; one role has one class (its linears: per expert count).
        key = ("layer" if role.isdecimal() else role, getattr(module, "num_experts", 1) if role in PRODUCTS else 0)
        first, kind_there = classes.setdefault(key, (path or "model", kind))
        if kind_there is not kind:
            yield f"replaced, is a {kind.__qualname__}; {first} is a {kind_there.__qualname__}"
    known = set() if like is None else {*like._modules, *like._parameters, *like._buffers}
    if extra := [child for child, there in module._modules.items() if there is not None and child not in known]:
        yield f"added or replaced, is a {kind.__qualname__} that holds {', '.join(extra)}"
    tensors = (*module._parameters.items(), *module._buffers.items())
    if extra := [tensor for tensor, there in tensors if there is not None and tensor not in known]:
        yield f"added parameters or buffers {', '.join(extra)}"


def _is_overridden(module: nn.Module, attribute: str, value: object, path: str) -> bool:
    """Whether an instance's attribute hides a method of its class, other than by the public implementation itself."""
    if not inspect.isroutine(getattr(type(module), attribute, None)):
        return False
    if path == "":
        return True  # it would hide the packed forward pass too
    if path == "block" and "_magi_wrapper_installed" in vars(module):  # @magi_compile
        return False
    # A norm there chooses one of its own methods by its number of experts.
    own: Any = getattr(value, "__func__", None)
    return getattr(value, "__self__", None) is not module or getattr(type(module), own.__name__, None) is not own


def _overriding(kind: type) -> tuple[type, str] | None:
    """(class, method) of the first method that a class redefines over one of its bases below nn.Module, or None."""
    seen: dict[str, type] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if name.startswith("__") or name in _BESIDE_FORWARD:
                continue
            if not (inspect.isroutine(value) or isinstance(value, property)):
                continue
            above = seen.setdefault(name, base)
            if above is not base and (above.__name__, base.__name__) != ("NativeMoELinear", "BaseLinear"):
                return above, name
    return None


def _called(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
