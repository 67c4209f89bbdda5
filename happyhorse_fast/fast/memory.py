"""Peak memory of a model, measured without the memory and without a GPU: fake tensors, every live storage counted.

Counted are the bytes of tensors, as the operations' shapes and lifetimes give them: weights, inputs, temporaries. Not
counted are the CUDA context, library workspaces, and what the allocator rounds up or cannot reuse.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from happyhorse_fast import ambient
from happyhorse_fast.config import PATCH, ModelConfig
from happyhorse_fast.costs import layer_kind
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.eager.sequence import Clip
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.compiled import unwrapped
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.layer import FastLayer
from happyhorse_fast.fast.parallelize import ranks_of
from happyhorse_fast.fast.state import build_clip_state, is_accelerated
from happyhorse_fast.fast.step import at_step
from happyhorse_fast.parallel.group import Planned
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens


@dataclass(frozen=True)
class PeakMemory:
    """Peak of one run.

    Attributes:
        peak_bytes: Live bytes at the peak, weights and inputs included.
        weight_bytes: Of them, parameters and buffers.
        operation: Operation that reached the peak, with the shape it made.
    """

    peak_bytes: int
    weight_bytes: int
    operation: str


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of live storages while it is entered; views share their storage, so they count once.

    Works on real and on fake tensors. Tensors made before have to be :meth:`register`-ed.

    Attributes:
        live_bytes: Now.
        peak_bytes: At the peak.
        operation: What reached the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.operation = "nothing"
        self._live: dict[int, int] = {}

    def register(self, tensors: Iterable[torch.Tensor], name: str) -> int:
        """Count tensors that exist already; returns the bytes that were not counted before."""
        before = self.live_bytes
        for tensor in tensors:
            self._count(tensor, name)
        return self.live_bytes - before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, str(func))
        return out

    def _count(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.operation = f"{name} -> {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        # The storage's Python object lives as long as the storage, whatever views come and go.
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key)


class _AsOnCuda(TorchFunctionMode):
    """Fake tensors on the CPU choose what tensors on a GPU would.

    That is PyTorch's fused attention, which is counted as FlashAttention: the choice of a GPU for 16-bit tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # a property, whose stub is a bool
            return True
        if func is torch.nn.functional.scaled_dot_product_attention and set(kwargs) <= {"enable_gqa", "scale"}:
            flash = torch.ops.aten._scaled_dot_product_flash_attention.default
            return flash(*args, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


Module = TypeVar("Module", bound=nn.Module)


@ambient.independent
def fake_copy(model: Module) -> Module:
    """A copy of a model with fake tensors on the CPU in place of its own, shared where they were shared.

    To be called under a FakeTensorMode. Costs no memory for the tensors, whatever the model's size and device.
    """
    fakes: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    if is_accelerated(model):
        fakes[id(model.fast.originals)] = []  # type: ignore[union-attr]  # they are on the CPU, and stay there
    return copy.deepcopy(model, fakes)


Call = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], object]


@ambient.independent
def peak_memory(
    model: nn.Module,
    clip: ClipTokens,
    text: int = TEXT_TOKENS,
    *,
    call: Call | None = None,
    gpus: int | None = None,
    rank: int = 0,
) -> PeakMemory:
    """Peak memory of a forward pass on a clip, as it would be on a GPU, which need not be there.

    Args:
        model: On any device, ``"meta"`` included; with attribute ``config``. It is left as it is.
        clip: Latent size and audio tokens.
        text: Text tokens.
        call: What to run, (model, video, audio, text) -> anything; the forward pass where None.
        gpus: Ranks that share the sequence; as the model's own where None.
        rank: Which of them is measured.

    Raises:
        TypeError: The model has no :class:`ModelConfig` under ``config``.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise TypeError(f"model must have a ModelConfig as its attribute config, got {type(config).__name__}")
    meter = StorageMeter()
    state: ClipState | None = None
    own = ranks_of(model)
    if gpus is None and own is not None:
        gpus, rank = own.size, own.rank
    planned = None if gpus in (None, 1) else Planned(gpus, rank)
    first = last = 0  # exact steps: where sparsity applies, its maps take memory too
    if is_accelerated(model):
        fast: FastConfig = model.fast.fast  # type: ignore[union-attr,assignment]
        first, last = fast.exact_first_steps, fast.exact_last_steps
        # Block maps come from real ranges: made here, their shapes pretended below.
        grid = Clip(clip.T, clip.H // PATCH[1], clip.W // PATCH[2], clip.audio, text)
        state = build_clip_state(model.fast, grid, frequency_bands(config.head_dim), planned)  # type: ignore[arg-type]
    with FakeTensorMode(), torch.no_grad():
        fake: Any = fake_copy(model)
        (fake.fast if state is not None else fake).ranks = planned
        if state is not None:
            pretended = state.fake("cpu")
            fake.fast.clips = {grid: pretended}
            meter.register(pretended.tensors(), "clip state")
        shapes = (
            (1, config.latent_channels, clip.T, clip.H, clip.W),
            (1, clip.audio, config.audio_in_channels),
            (1, text, config.text_in_channels),
        )
        inputs = [torch.empty(shape) for shape in shapes]
        weights = meter.register((*fake.parameters(), *fake.buffers()), "weights")
        meter.register(inputs, "inputs")
        with _AsOnCuda(), meter, at_step(first, first + last + 1):
            out = fake(*inputs) if call is None else call(fake, *inputs)
        del out
    return PeakMemory(meter.peak_bytes, weights, meter.operation)


def one_layer_per_kind(config: ModelConfig, clip: ClipTokens) -> ModelConfig:
    """The same model with each kind of layer once, in the order of their first occurrence."""
    first: dict[str, int] = {}
    for layer in range(config.num_layers):
        first.setdefault(layer_kind(config, layer, clip), layer)
    kept = {
        name: tuple(place for place, layer in enumerate(first.values()) if layer in getattr(config, name))
        for name in ("mm_layers", "local_attn_layers", "gelu7_layers", "post_norm_layers")
    }
    return config.replace(num_layers=len(first), **kept)


@ambient.independent
def peak_by_kind(
    config: ModelConfig, clip: ClipTokens, build: Callable[[ModelConfig], nn.Module], *, text: int = TEXT_TOKENS
) -> int:
    """Peak bytes of a model from one layer of each kind: the layers run one after another, so only weights add up.

    A tenth of the time of :func:`peak_memory` on the full model, and the same number as long as no layer keeps anything
    for a later one.

    Args:
        config: Of the full model.
        clip: Latent size and audio tokens.
        build: Makes the model of a configuration, on ``"meta"``.
        text: Text tokens.
    """
    shallow, full = build(one_layer_per_kind(config, clip)), build(config)
    return peak_memory(shallow, clip, text).peak_bytes + weight_bytes(full) - weight_bytes(shallow)


def sharded_bytes(model: Any, ranks: int) -> tuple[int, int]:
    """Weights that are spread over P ranks, ``parallelize(shard_weights=True)``, in bytes of one.

    Args:
        model: As it is before that, on whatever device.
        ranks: P.

    Returns:
        (what it holds, layers that are whole at the peak: one as it arrives and in its place, or that and the next).
    """
    spread = []
    for layer in model.block.layers:
        packed = isinstance(layer, FastLayer)
        matrices = map(layer.get_buffer, layer.matrices()) if packed else (p for p in layer.parameters() if p.dim() > 1)
        spread.append(sum(x.nbytes for x in matrices if x.flatten(0, 1 if packed else 0).shape[0] % ranks == 0))
    whole = max(first + max(first, after) for first, after in zip(spread, [*spread[1:], 0], strict=True))
    return weight_bytes(model) - sum(spread) * (ranks - 1) // ranks, whole


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, on whatever device."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
