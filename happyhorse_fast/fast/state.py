"""State of an accelerated model beside its packed layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.eager.sequence import Clip
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.compiled import untraced
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.layer import FastLayer, pack_layer
from happyhorse_fast.fast.padded_rows import PaddedRows
from happyhorse_fast.fast.plan import LayerPlan
from happyhorse_fast.ops.runtime.checks import compute_capability, is_capturing
from happyhorse_fast.ops.runtime.dispatch import Choice
from happyhorse_fast.parallel.group import Ranks


class _InGraphs:
    """A :class:`ClipState` per attribute: torch.compile guards a single attribute, but all keys of a dictionary."""


def _attribute(clip: Clip) -> str:
    return "clip_" + "_".join([str(size) for size in clip])


@dataclass
class FastState:
    """State of an accelerated model beside its packed layers. It does not refer to the model.

    Attributes:
        config: The model's configuration.
        fast: How it is accelerated.
        choices: Implementation and reason per op.
        eager_class: The model's class before.
        originals: The layers that were replaced, on the CPU; empty where they were dropped.
        bands: Rotary frequencies on the CPU, real ones: while a model is traced its own may not be.
        clips: State of the clips seen last, by their key.
        in_graphs: Of clips that torch compiled a graph for, or that were captured in a CUDA graph: a graph reads them
            for as long as there is the model.
        restored: Whether the packed layers are gone.
        ranks: Processes that share every clip; None for one.
    """

    config: ModelConfig
    fast: FastConfig
    choices: dict[str, Choice]
    eager_class: type[nn.Module] = HappyHorse
    originals: list[nn.Module] = field(default_factory=list)
    bands: torch.Tensor = field(init=False)
    clips: dict[Hashable, ClipState] = field(default_factory=dict)
    in_graphs: _InGraphs = field(default_factory=_InGraphs)
    restored: bool = False
    ranks: Ranks | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    # Two clips, so that guidance, whose prompt and null prompt differ in length, computes neither twice.
    MOST_CLIPS = 2

    def __post_init__(self) -> None:
        """Frequencies as the head dim gives them, until the model's own are there."""
        with untraced():
            self.bands = frequency_bands(self.config.head_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> FastState:
        """A state for a copy of the model, which makes its clips' states itself."""
        originals = copy.deepcopy(self.originals, memo)
        other = FastState(self.config, self.fast, dict(self.choices), self.eager_class, originals)
        other.bands, other.ranks = self.bands, self.ranks
        return other

    def pack(self, index: int, tensors: Mapping[str, torch.Tensor], device: torch.device) -> FastLayer:
        """Layer ``index``, packed on a device from its published tensors."""
        fast = self.fast.on(compute_capability(device))
        return pack_layer(tensors, LayerPlan.of(self.config, fast, index, self.choices), device)

    def take_bands(self, bands: torch.Tensor) -> None:
        """Rotate by a model's own frequencies, copied, unless they are still to be loaded."""
        if not bands.is_meta:
            self.bands = bands.detach().cpu().clone()
        self.forget()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle: what runs a layer is this machine's choice."""
        raise TypeError(
            "an accelerated model does not pickle (nor torch.save): save_packed(model, folder) keeps its weights and "
            "load(folder) reads them; copy.deepcopy copies it within a process"
        )

    def clip(self, clip: Clip, device: torch.device) -> ClipState:
        """The state of one clip on a device, built at its first use."""
        if torch.compiler.is_dynamo_compiling():
            self.keep(tuple(clip), device)
            kept: ClipState = getattr(self.in_graphs, _attribute(clip))
            return kept
        state = self.clip_state(clip, device, lambda: build_clip_state(self, clip, self.bands.to(device), self.ranks))
        if is_capturing(device):
            setattr(self.in_graphs, _attribute(clip), state)
        return state

    def keep(self, sizes: tuple[int, ...], device: torch.device) -> None:
        """Runs for real while torch compiles a graph, and leaves the clip's state where the graph finds it."""
        clip = Clip(*sizes)
        setattr(self.in_graphs, _attribute(clip), self.clip(clip, device))

    def clip_state(self, key: Hashable, device: torch.device, build: Callable[[], ClipState]) -> ClipState:
        """The state of a clip on a device, built at its first use, of real tensors whatever traces the call.

        Raises:
            RuntimeError: It would have to be built while a CUDA graph is captured.
        """
        with self._lock:
            state = self.clips.get(key)
            if state is not None and state.device == device:
                return state
            if is_capturing(device):
                raise RuntimeError(
                    "a CUDA graph of an accelerated model must be captured after a call with the same clip's shape: "
                    "what a shape needs is made at its first call, which waits for the device"
                )
            with untraced():
                state = build()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # other threads may use it on streams of their own
            # A new dictionary: other threads may be looking through the old one.
            kept = [(k, v) for k, v in self.clips.items() if k != key and v.device == device]
            self.clips = dict([*kept[1 - self.MOST_CLIPS :], (key, state)])
            return state

    def forget(self) -> None:
        """Drop what was made for the clips seen last: it is on another device, or of other frequencies."""
        with self._lock:
            self.clips, self.in_graphs = {}, _InGraphs()

    def require_packed(self) -> None:
        """Raise a RuntimeError where the packed layers were given back through another reference to them."""
        if self.restored:
            raise RuntimeError(
                "the model's packed layers are gone: restore() was called in another thread, or on a shallow copy "
                "(copy.copy) of this model, which shares its layers; copy.deepcopy makes a copy of its own"
            )


def build_clip_state(state: FastState, clip: Clip, bands: torch.Tensor, ranks: Ranks | None = None) -> ClipState:
    """The state of one clip that ``ranks`` share, on the device of the rotary frequencies ``bands``."""
    config = state.config
    windowed = any(config.is_local(i, clip.frame_tokens) for i in config.local_attn_layers)
    local = sequence.local_ranges(clip, config.frame_receptive_field) if windowed else None
    return ClipState.build(
        PaddedRows.of(clip, windowed=windowed),
        sequence.dense_ranges(clip),
        local,
        sequence.coordinates(clip, config.coords_style, bands.device),
        bands,
        state.fast,
        clip.columns,
        ranks,
    )


def is_accelerated(model: nn.Module) -> bool:
    """Whether :func:`accelerate` was applied."""
    return isinstance(getattr(model, "fast", None), FastState)
