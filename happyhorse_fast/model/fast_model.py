"""Forward passes of an accelerated model: our own signature, and the public implementation's. Inference only."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from happyhorse_fast import ambient
from happyhorse_fast.errors import require_finite, require_tensor
from happyhorse_fast.model.clip_state import ClipState
from happyhorse_fast.model.fast_state import FastState
from happyhorse_fast.model.padded_rows import PaddedRows, Spans, worth_aligning
from happyhorse_fast.model.refusals import require_running
from happyhorse_fast.reference import sequence
from happyhorse_fast.reference.float32 import linear
from happyhorse_fast.reference.model import ROW_CHUNK, LayerHook
from happyhorse_fast.reference.rmsnorm_qkv import rms_norm
from happyhorse_fast.reference.sequence import Ranges

MODALITY_EMBEDDERS = ("video_embedder", "audio_embedder", "text_embedder")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
P = ParamSpec("P")
R = TypeVar("R")


def inference(forward: Callable[P, R]) -> Callable[P, R]:
    """A model's method without gradients, and whatever torch's settings are.

    Every dtype is chosen here already; autocast, also in a graph, would make bf16 of the float32 products at both ends.
    """

    @ambient.makes_tensors  # a clip's state is kept for later calls
    @functools.wraps(forward)
    @torch.no_grad()
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0]
        if not torch.compiler.is_compiling():
            require_running(model)
        kind = next(model.parameters()).device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return forward(*args, **kwargs)
        return forward(*args, **kwargs)

    return run


def run_layers(model: Any, hidden: torch.Tensor, state: ClipState, on_layer: LayerHook | None = None) -> None:
    """Update the padded residual stream, float32 [rows, C], in place, layer by layer."""
    rows_in_mlp = model.fast.fast.mlp_rows
    for index, layer in enumerate(model.block.layers):
        if layer(hidden, state, rows_in_mlp) is not None:
            raise ValueError(
                f"a forward hook on block.layers.{index} returned a value, which nothing would take: a packed layer "
                "updates the residual stream in place, and so must its hooks"
            )
        if on_layer is not None:
            on_layer(index, hidden[state.token_rows])


def embed(embedder: nn.Linear, tokens: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor) -> None:
    """Write float32 embeddings of tokens [M, channels] into their rows, a chunk at a time."""
    for first in range(0, len(tokens), ROW_CHUNK):
        part = slice(first, first + ROW_CHUNK)
        hidden.index_copy_(0, rows[part], linear(tokens[part].float(), embedder.weight, embedder.bias))


def head(hidden: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 output head on some rows, [M] -> [M, channels], a chunk at a time."""
    chunks = [linear(rms_norm(hidden.index_select(0, part), norm), weight) for part in rows.split(ROW_CHUNK)]
    return torch.cat(chunks)


class Accelerated:
    """What both kinds of accelerated model share."""

    fast: FastState

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
        """Velocities of one clip; arguments, results and errors as ``HappyHorse.forward``.

        Under torch.compile a graph belongs to one clip shape, whose block maps are its constants: pass
        ``dynamic=False`` where shapes change, or the second shape cannot be traced.
        """
        config = self.config
        clip = sequence.check_inputs(config, video, audio, text, self.device)
        self.fast.ensure_clip(*clip)
        state = self.fast.clips[clip]
        hidden = torch.zeros(state.rows.slots, config.hidden_size, dtype=torch.float32, device=self.device)
        tokens = (sequence.patchify(video), audio[0], text[0])
        for rows, name, part in zip(clip.slices(), MODALITY_EMBEDDERS, tokens, strict=True):
            embed(getattr(self.adapter, name), part, state.token_rows[rows], hidden)
        del tokens, part
        run_layers(self, hidden, state, on_layer)
        video_rows, audio_rows, _ = (state.token_rows[rows] for rows in clip.slices())
        video_out = head(hidden, video_rows, self.final_norm_video.weight, self.final_linear_video.weight)
        audio_out = head(hidden, audio_rows, self.final_norm_audio.weight, self.final_linear_audio.weight)
        return sequence.unpatchify(video_out, clip), audio_out.unsqueeze(0)


def clip_builder(state: FastState, device: Callable[[], torch.device], bands: torch.Tensor) -> Callable[..., bool]:
    """What makes sure that a clip's state is there, by its five sizes.

    While torch compiles or exports, this runs for real and once: the state is made of real tensors, outside of every
    tracing mode. ``bands`` are therefore a copy that no mode can replace.
    """

    @torch.compiler.assume_constant_result
    def ensure_clip(*sizes: int) -> bool:
        clip = sequence.Clip(*sizes)
        with _disable_current_modes():
            state.clip_state(clip, lambda: build_clip_state(state, clip, bands.to(device())))
        return True

    return ensure_clip


def build_clip_state(state: FastState, clip: sequence.Clip, bands: torch.Tensor) -> ClipState:
    """The state of one clip, on the device of the rotary frequencies ``bands``."""
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
        config.num_layers,
        state.step,
        clip.columns,
    )


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
        """
        config = self.fast.config
        device = next(self.parameters()).device
        channels = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
        x = require_tensor("x", x, ("N", "channels"), device=device)
        if x.shape[1] < max(channels):
            raise ValueError(
                f"x must have at least {max(channels)} channels, the widest modality's; got {list(x.shape)}"
            )
        n = x.shape[0]
        coords = require_tensor("coords_mapping", coords_mapping, (n, 9), device=device).float()
        require_finite("coords_mapping", coords)
        _check_modality(modality_mapping, n, device)
        local: Ranges | None = None
        if config.local_attn_layers:
            if local_attn_handler is None:
                raise ValueError(
                    f"local_attn_handler must not be None: layers {list(config.local_attn_layers)} are local"
                )
            local = _local_ranges(local_attn_handler, n)
        spans = _spans(modality_mapping, coords)
        # 2 MB at 1080p: a digest costs milliseconds, a stale rotation would be silent.
        digest = hashlib.blake2b(coords.cpu().numpy().tobytes()).digest()
        key = (tuple(spans), None if local is None else tuple(local), digest)
        state = self.fast.clip_state(
            key,
            lambda: ClipState.build(
                PaddedRows.of_spans(spans, align=_aligned(spans, local is not None)),
                [(0, n, 0, n)],
                local,
                coords,
                self.adapter.rope.bands,
                self.fast.fast,
                config.num_layers,
                self.fast.step,
            ),
        )
        hidden = torch.zeros(state.rows.slots, config.hidden_size, dtype=torch.float32, device=device)
        where = [(modality_mapping == m).nonzero()[:, 0] for m in range(3)]
        for tokens, name, width in zip(where, MODALITY_EMBEDDERS, channels, strict=True):
            embed(getattr(self.adapter, name), x[tokens, :width], state.token_rows[tokens], hidden)
        run_layers(self, hidden, state)
        out = torch.zeros(n, max(channels[:2]), dtype=torch.float32, device=device)
        for tokens, name, width in zip(where[:2], ("video", "audio"), channels[:2], strict=True):
            norm, weight = getattr(self, f"final_norm_{name}").weight, getattr(self, f"final_linear_{name}").weight
            out[tokens, :width] = head(hidden, state.token_rows[tokens], norm, weight)
        return out


def _local_ranges(handler: Any, n: int) -> Ranges:
    """(q start, q end, k start, k end) of the local layers, which must lie in the sequence."""
    ranges: list[Any] = [getattr(handler, name, None) for name in ("q_ranges", "k_ranges")]
    shapes = [list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in ranges]
    if not all(isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape == (len(ranges[0]), 2) for x in ranges):
        raise ValueError(f"local_attn_handler must have q_ranges and k_ranges [R, 2], got {shapes[0]} and {shapes[1]}")
    pairs: list[list[int]] = torch.cat(ranges, dim=1).tolist()
    for pair in pairs:
        if not (0 <= pair[0] <= pair[1] <= n and 0 <= pair[2] <= pair[3] <= n):
            raise ValueError(f"local_attn_handler must have ranges within the {n} tokens of the sequence, got {pair}")
    return [(q0, q1, k0, k1) for q0, q1, k0, k1 in pairs]


def _check_modality(modality: object, n: int, device: torch.device) -> None:
    if not isinstance(modality, torch.Tensor) or modality.dtype not in _INTEGERS:
        what = modality.dtype if isinstance(modality, torch.Tensor) else type(modality).__name__
        raise TypeError(f"modality_mapping must be a tensor of integers [{n}], got {what}")
    if modality.shape != (n,):
        raise ValueError(f"modality_mapping must be of shape [{n}], got {list(modality.shape)}")
    if modality.device != device:
        raise ValueError(f"modality_mapping must be on device {device}, where the model is; got {modality.device}")


def _spans(modality: torch.Tensor, coords: torch.Tensor) -> Spans:
    """(first, end, modality) of every run of tokens; video is cut into its latent frames, whose time differs."""
    change = (modality[1:] != modality[:-1]) | ((modality[1:] == 0) & (coords[1:, 0] != coords[:-1, 0]))
    cuts = [0, *(change.nonzero()[:, 0] + 1).tolist(), len(modality)]
    kinds = modality[torch.tensor(cuts[:-1], device=modality.device)].tolist()
    if strange := sorted({*kinds} - {0, 1, 2}):
        raise ValueError(f"modality_mapping must hold 0 (video), 1 (audio) and 2 (text), got {strange}")
    return list(zip(cuts[:-1], cuts[1:], kinds, strict=True))


def _aligned(spans: Spans, windowed: bool) -> bool:
    return windowed and worth_aligning(max((end - first for first, end, m in spans if m == 0), default=0))
