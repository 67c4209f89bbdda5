"""Forward passes of an accelerated model: our own signature, and the public implementation's. Inference only."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from happyhorse_fast import ambient
from happyhorse_fast.arguments import require_finite, require_tensor
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.float32 import linear
from happyhorse_fast.eager.model import ROW_CHUNK, HappyHorse, LayerHook
from happyhorse_fast.eager.qkv import rms_norm
from happyhorse_fast.eager.sequence import Ranges
from happyhorse_fast.fast.clip_state import ClipState
from happyhorse_fast.fast.compiled import load_compiler
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.layer import require_kept_dtypes
from happyhorse_fast.fast.padded_rows import PaddedRows, Spans, worth_aligning
from happyhorse_fast.fast.refusals import require_running
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.fast.step import answer, is_exact, step_in_words
from happyhorse_fast.ops.runtime.checks import has_tangent
from happyhorse_fast.parallel.sharded import gather

MODALITY_EMBEDDERS = ("video_embedder", "audio_embedder", "text_embedder")
_RANGES = ("q_ranges", "k_ranges")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
P = ParamSpec("P")
R = TypeVar("R")


def inference(forward: Callable[P, R]) -> Callable[P, R]:
    """Run a model's method without gradients, independent of torch's settings, on every rank that shares the clip."""
    names = tuple(inspect.signature(forward).parameters)

    def inputs_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, without the model."""
        return dict(zip(names[1:], args[1:], strict=False)) | dict(kwargs)

    @ambient.makes_tensors  # a clip's state is kept for later calls
    @functools.wraps(forward)
    @torch.no_grad()
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0]
        if not torch.compiler.is_compiling():
            model.fast.require_packed()
            require_running(model)
            for name, value in inputs_of(args, kwargs).items():
                if isinstance(value, torch.Tensor) and has_tangent(value):
                    raise ValueError(f"{name} must have no tangent: an accelerated model has no derivatives")
        if model.fast.ranks is None:
            return forward(*args, **kwargs)
        inputs = inputs_of(args, kwargs)
        handler = inputs.pop("local_attn_handler", None)
        inputs |= {f"local_attn_handler.{name}": getattr(handler, name, None) for name in _RANGES}
        with model.fast.ranks.call(step_in_words, **inputs):
            return forward(*args, **kwargs)

    return run


def packed_layers(model: Any) -> list[nn.Module]:
    """The layers as they are now; a :func:`restore` in another thread does not change this list.

    Raises:
        RuntimeError: They were given back already.
    """
    layers = list(model.block.layers)
    model.fast.require_packed()  # in this order: restore says so before it takes the first
    return layers


def run_layers(
    layers: list[nn.Module],
    fast: FastConfig,
    hidden: torch.Tensor,
    state: ClipState,
    on_layer: LayerHook | None = None,
) -> None:
    """Update the padded residual stream, float32 [rows, C], in place, layer by layer."""
    exact = is_exact(fast)
    for index, layer in enumerate(layers):
        gather(layers, index)
        if layer(hidden, state, fast.rows_in_mlp, exact=exact) is not None:
            raise ValueError(
                f"a forward hook on block.layers.{index} returned a value, which nothing would take: a packed layer "
                "updates the residual stream in place, and so must its hooks"
            )
        if on_layer is not None:
            on_layer(index, state.every_row(hidden)[state.token_rows + state.share.first])


def embed(embedder: nn.Linear, tokens: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor) -> None:
    """Write float32 embeddings of tokens [M, channels] into their rows, a chunk at a time."""
    for first in range(0, len(tokens), ROW_CHUNK):
        part = slice(first, first + ROW_CHUNK)
        hidden.index_copy_(0, rows[part], linear(tokens[part].float(), embedder.weight, embedder.bias))


def head(hidden: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 output head on some rows, [M] -> [M, channels], a chunk at a time."""
    # Not by split, which fake tensors of torch 2.11 do not have of no rows.
    parts = [rows[first : first + ROW_CHUNK] for first in range(0, max(1, len(rows)), ROW_CHUNK)]
    return torch.cat([linear(rms_norm(hidden.index_select(0, part), norm), weight) for part in parts])


class Accelerated:
    """Methods of a model of either signature while its layers are packed."""

    fast: FastState

    def __reduce_ex__(self: Any, protocol: object) -> Any:
        """For ``copy``; :class:`FastState` refuses ``pickle``. A ``__deepcopy__`` would hide that of torch.compile."""
        return _new, (self.fast.eager_class,), self.__getstate__()

    def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Carry out ``nn.Module.to`` and the like; states of clips are made anew on the new device.

        Raises:
            TypeError: Some tensor's dtype would change.
        """
        require_kept_dtypes(self, fn)
        self.fast.forget()
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.load_state_dict``; rotations are made anew of the frequencies that came."""
        result = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.fast.take_bands(self.adapter.rope.bands)
        return result

    def _load_from_state_dict(self: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # Before anything is copied: the embedders come before the layers, which refuse what is not packed.
        for index, layer in enumerate(self.block.layers):
            layer.require_packed(state_dict, f"{prefix}block.layers.{index}.")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class AcceleratedHappyHorse(Accelerated):
    """Forward pass over packed layers, in the place of ``HappyHorse.forward``; made by ``accelerate``."""

    @inference
    def forward(
        self: Any, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, *, on_layer: LayerHook | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of one clip; arguments and results as ``HappyHorse.forward``.

        Under torch.compile a graph belongs to one clip shape, whose block maps are its constants: every shape has its
        own, and ``dynamic=True`` cannot be traced. Where sparsity goes by the step, there is one graph of the exact
        steps and one of the others.

        Raises:
            TypeError, ValueError, NonFiniteError: As ``HappyHorse.forward``.
            ValueError: Sparsity goes by the step, and the call is not inside ``at_step``.
            RuntimeError: A shape's first call is in the capture of a CUDA graph; or the layers were given back.
        """
        config = self.config
        clip = sequence.check_inputs(config, video, audio, text, self.device)
        layers = packed_layers(self)
        state = self.fast.clip(clip, self.device)
        hidden = torch.zeros(state.share.count, config.hidden_size, dtype=torch.float32, device=self.device)
        held = [state.held(modality) for modality in range(3)]
        rows = [state.token_rows[every][part] for every, part in zip(clip.slices(), held, strict=True)]
        tokens = (sequence.patchify(video), audio[0], text[0])
        for name, values, part, there in zip(MODALITY_EMBEDDERS, tokens, held, rows, strict=True):
            embed(getattr(self.adapter, name), values[part], there, hidden)
        del tokens, values
        run_layers(layers, self.fast.fast, hidden, state, on_layer)
        video_out = head(hidden, rows[0], self.final_norm_video.weight, self.final_linear_video.weight)
        audio_out = head(hidden, rows[1], self.final_norm_audio.weight, self.final_linear_audio.weight)
        video_out, audio_out = (state.every_token(out, m) for m, out in enumerate((video_out, audio_out)))
        return sequence.unpatchify(video_out, clip), audio_out.unsqueeze(0)


class AcceleratedPublic(Accelerated):
    """Forward pass over packed layers with the public implementation's signature; made by ``accelerate``."""

    @inference
    def forward(
        self: Any,
        x: torch.Tensor,
        coords_mapping: torch.Tensor,
        modality_mapping: torch.Tensor,
        varlen_handler: Any,
        local_attn_handler: Any,
    ) -> torch.Tensor:
        """Velocities of a packed sequence.

        Args:
            x: [N, channels] tokens of every modality, narrower ones padded.
            coords_mapping: [N, 9] float32.
            modality_mapping: [N] integers: 0 video, 1 audio, 2 text.
            varlen_handler: Not read: a dense layer of the public implementation attends over the whole sequence.
            local_attn_handler: Its ``q_ranges`` and ``k_ranges`` [R, 2] are the local layers' attention; None if no
                layer is local.

        Returns:
            [N, max(video, audio channels)]; zero where a token has no velocity, as in the public implementation.

        Raises:
            TypeError, ValueError: A tensor of the wrong rank, size, dtype or device; another modality; ranges outside
                of the sequence.
            NonFiniteError: NaN or Inf in coords_mapping.
            ValueError: Sparsity goes by the step, and the call is not inside ``at_step``.
            RuntimeError: As :meth:`AcceleratedHappyHorse.forward`.
        """
        config = self.fast.config
        device = next(self.parameters()).device
        layers = packed_layers(self)
        channels = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
        x = require_tensor("x", x, ("N", "channels"), device=device)
        if x.shape[1] < max(channels):
            raise ValueError(
                f"x must have at least {max(channels)} channels, the widest modality's; got {list(x.shape)}"
            )
        n = x.shape[0]
        coords = require_tensor("coords_mapping", coords_mapping, (n, 9), device=device).float()
        require_finite("coords_mapping", coords)
        kinds = require_tensor("modality_mapping", modality_mapping, (n,), device=device, dtypes=_INTEGERS)
        state, where = self._layout(coords, kinds, local_attn_handler)
        hidden = torch.zeros(state.share.count, config.hidden_size, dtype=torch.float32, device=device)
        held = [tokens[state.held(modality)] for modality, tokens in enumerate(where)]
        for tokens, name, width in zip(held, MODALITY_EMBEDDERS, channels, strict=True):
            embed(getattr(self.adapter, name), x[tokens, :width], state.token_rows[tokens], hidden)
        run_layers(layers, self.fast.fast, hidden, state)
        out = torch.zeros(n, max(channels[:2]), dtype=torch.float32, device=device)
        for modality, name in enumerate(("video", "audio")):
            norm, weight = getattr(self, f"final_norm_{name}").weight, getattr(self, f"final_linear_{name}").weight
            values = head(hidden, state.token_rows[held[modality]], norm, weight)
            out[where[modality], : channels[modality]] = state.every_token(values, modality)
        return out

    def _layout(
        self: Any, coords: torch.Tensor, modality: torch.Tensor, local_attn_handler: Any
    ) -> tuple[ClipState, list[torch.Tensor]]:
        """The state of a sequence, and the tokens [M] of each modality: read off values, so no graph can hold it."""
        from torch._subclasses.fake_tensor import FakeTensor  # here: it loads Triton

        config = self.fast.config
        if isinstance(coords, FakeTensor) or coords.is_meta:
            raise TypeError(
                f"coords_mapping must hold data, got a {type(coords).__name__} on {coords.device}: the layout of a "
                "packed sequence is read off its values, so it can be neither exported nor traced with fake tensors"
            )
        local: Ranges | None = None
        if config.local_attn_layers:
            if local_attn_handler is None:
                raise ValueError(
                    f"local_attn_handler must not be None: layers {list(config.local_attn_layers)} are local"
                )
            local = _local_ranges(local_attn_handler, len(coords))
        spans = _spans(modality, coords)
        # 2 MB at 1080p: a digest costs milliseconds, a stale rotation would be silent.
        digest = hashlib.blake2b(coords.cpu().numpy().tobytes()).digest()
        key = (tuple(spans), None if local is None else tuple(local), digest)

        def build() -> ClipState:
            frame = max((end - first for first, end, m in spans if m == 0), default=0)
            rows = PaddedRows.of_spans(spans, align=local is not None and worth_aligning(frame))
            ranges = [(0, len(coords), 0, len(coords))]
            bands = self.fast.bands.to(coords.device)
            return ClipState.build(rows, ranges, local, coords, bands, self.fast.fast, ranks=self.fast.ranks)

        where = [(modality == m).nonzero()[:, 0] for m in range(3)]
        return self.fast.clip_state(key, coords.device, build), where


@functools.cache
def accelerated_class(eager: type[nn.Module]) -> type[nn.Module]:
    """The class of an accelerated model; one per eager class, so that the next model uses the same compiled graphs."""
    name = f"Accelerated{eager.__name__}"
    # torch.compiler loads Triton, so not where these are defined.
    load_compiler()
    torch.compiler.assume_constant_result(FastState.keep)
    torch.compiler.assume_constant_result(answer)
    if issubclass(eager, HappyHorse):
        return type(name, (AcceleratedHappyHorse, eager), {})
    return type(name, (AcceleratedPublic, eager), {"_layout": torch.compiler.disable(AcceleratedPublic._layout)})


def _new(eager: type[nn.Module]) -> Any:
    return object.__new__(accelerated_class(eager))  # type: ignore[arg-type]


def _local_ranges(handler: Any, n: int) -> Ranges:
    """(q start, q end, k start, k end) of the local layers, which must lie in the sequence."""
    ranges: list[Any] = [getattr(handler, name, None) for name in _RANGES]
    shapes = [list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in ranges]
    if not all(isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape == (len(ranges[0]), 2) for x in ranges):
        raise ValueError(f"local_attn_handler must have q_ranges and k_ranges [R, 2], got {shapes[0]} and {shapes[1]}")
    pairs: list[list[int]] = torch.cat(ranges, dim=1).tolist()
    for pair in pairs:
        if not (0 <= pair[0] <= pair[1] <= n and 0 <= pair[2] <= pair[3] <= n):
            raise ValueError(f"local_attn_handler must have ranges within the {n} tokens of the sequence, got {pair}")
    return [(q0, q1, k0, k1) for q0, q1, k0, k1 in pairs]


def _spans(modality: torch.Tensor, coords: torch.Tensor) -> Spans:
    """(first, end, modality) of every run of tokens; video is cut into its latent frames, whose time differs."""
    change = (modality[1:] != modality[:-1]) | ((modality[1:] == 0) & (coords[1:, 0] != coords[:-1, 0]))
    cuts = [0, *(change.nonzero()[:, 0] + 1).tolist(), len(modality)]
    kinds = modality[torch.tensor(cuts[:-1], device=modality.device)].tolist()
    if strange := sorted({*kinds} - {0, 1, 2}):
        raise ValueError(f"modality_mapping must hold 0 (video), 1 (audio) and 2 (text), got {strange}")
    return list(zip(cuts[:-1], cuts[1:], kinds, strict=True))
