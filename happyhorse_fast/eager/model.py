"""The eager model: one sequence of video, audio and text tokens through a sandwich Transformer, in plain torch.

It follows the public implementation to the last rounding point and carries its state-dict keys, so published
checkpoints load as they are. Everything runs in chunks of rows, so it needs no [tokens, tokens] or
[tokens, intermediate] tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from happyhorse_fast import ambient
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.attention import block_sparse_attention, fused_attention
from happyhorse_fast.eager.float32 import linear
from happyhorse_fast.eager.mlp import gelu7, swiglu7
from happyhorse_fast.eager.qkv import rms_norm, rmsnorm_qkv
from happyhorse_fast.eager.rotary import frequency_bands, rotary_phases
from happyhorse_fast.eager.sequence import Clip, Ranges
from happyhorse_fast.parallel.group import Ranks
from happyhorse_fast.parallel.rows import RowShare
from happyhorse_fast.parallel.sharded import gather
from happyhorse_fast.parallel.ulysses import Ulysses

# Rows in flight in a norm, a QKV product or an MLP: 8192 x 27304 float32 is 0.9 GB, all 64k rows would be 7 GB.
ROW_CHUNK = 8192
COMPUTE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Weight(nn.Module):
    """A parameter that holds one block of rows per expert; [experts * rows, ...]."""

    def __init__(self, experts: int, *shape: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.experts = experts
        size = (experts * shape[0], *shape[1:])
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

    def of(self, expert: int) -> torch.Tensor:
        """The rows of one expert."""
        return self.weight.chunk(self.experts, dim=0)[expert]


class Pass(NamedTuple):
    """What a forward pass gives every layer beside the residual stream.

    Attributes:
        phases: [N, 6B].
        clip: The tokens; over ranks those of this rank's rows.
        ranges: Which tokens attend to which, of the whole sequence.
        compute_dtype: Of products and attention.
        ulysses: What exchanges rows for heads, over ranks.
    """

    phases: torch.Tensor
    clip: Clip
    ranges: Ranges
    compute_dtype: torch.dtype
    ulysses: Ulysses | None


class Attention(nn.Module):
    """Pre-norm, QKV with gate, QK-norm, rotary, attention over ranges, gated projection."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.heads = {"num_heads_q": config.num_heads_q, "num_heads_kv": config.num_heads_kv}
        experts, width = config.experts(layer), config.hidden_size
        attended = config.num_heads_q * config.head_dim
        self.pre_norm = Weight(experts, width, dtype=torch.float32, device=device)
        self.linear_qkv = Weight(experts, config.qkv_features, width, dtype=dtype, device=device)
        self.q_norm = Weight(experts, config.head_dim, dtype=torch.float32, device=device)
        self.k_norm = Weight(experts, config.head_dim, dtype=torch.float32, device=device)
        self.linear_proj = Weight(experts, width, attended, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor, given: Pass) -> torch.Tensor:
        """[N, hidden] residual stream -> [N, hidden] to add to it, in the stream's dtype; over ranks, of its rows."""
        q, k, v, gate = self.qkv(hidden, given.phases, given.clip, given.compute_dtype)
        ulysses = given.ulysses
        if ulysses is None:
            attended = self.attend(q, k, v, given.ranges)
        else:
            coming = [ulysses.heads_of_rows(x) for x in (k, v, q)]
            del q, k, v
            k, v, q = (transfer.wait() for transfer in coming)
            attended = ulysses.rows_of_heads(self.attend(q, k, v, given.ranges)).wait().flatten(1, 2)
            del q, k, v
        outputs = []
        for e, rows in sequence.row_chunks(given.clip, self.pre_norm.experts, ROW_CHUNK):
            outputs.append(self.project(self.gated(attended[rows], torch.sigmoid(gate[rows])), e))
        return torch.cat(outputs).to(hidden.dtype)

    def qkv(
        self, hidden: torch.Tensor, phases: torch.Tensor, clip: Clip, compute_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, hidden] -> q [N, Hq, D], k and v [N, Hkv, D] in ``compute_dtype``, gate [N, Hq] before its sigmoid."""
        parts = []
        for e, rows in sequence.row_chunks(clip, self.pre_norm.experts, ROW_CHUNK):
            weights = (self.pre_norm, self.linear_qkv, self.q_norm, self.k_norm)
            norm, qkv, q_norm, k_norm = (weight.of(e) for weight in weights)
            made = rmsnorm_qkv(
                hidden[rows], norm, qkv, q_norm, k_norm, phases[rows], compute_dtype=compute_dtype, **self.heads
            )
            parts.append(made)
        q, k, v, gate = (torch.cat(p) for p in zip(*parts, strict=True))
        return q, k, v, gate

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: Ranges) -> torch.Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D], in one dtype; PyTorch's fused kernels in bf16 on a GPU."""
        if q.is_cuda and q.dtype == torch.bfloat16:
            return fused_attention(q, k, v, ranges)
        return block_sparse_attention(q, k, v, ranges)[0]

    @staticmethod
    def gated(attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., Hq, D] times its gate [..., Hq] in the gate's dtype, the stream's -> [..., Hq * D] in its own dtype."""
        return (attended.to(gate.dtype) * gate.unsqueeze(-1)).flatten(-2).to(attended.dtype)

    def project(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """[..., Hq * D] rows of one expert -> [..., hidden] in the dtype of ``x``."""
        return linear(x, self.linear_proj.of(expert).to(x.dtype))


class MLP(nn.Module):
    """Pre-norm, up projection, GELU7 or SwiGLU7, down projection."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        experts, width = config.experts(layer), config.hidden_size
        self.gated = layer not in config.gelu7_layers
        self.pre_norm = Weight(experts, width, dtype=torch.float32, device=device)
        self.up_gate_proj = Weight(experts, config.up_features(layer), width, dtype=dtype, device=device)
        self.down_proj = Weight(experts, width, config.intermediate_size(layer), dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor, clip: Clip, compute_dtype: torch.dtype) -> torch.Tensor:
        """[N, hidden] residual stream -> [N, hidden] to add to it, in the stream's dtype."""
        outputs = []
        for e, rows in sequence.row_chunks(clip, self.pre_norm.experts, ROW_CHUNK):
            outputs.append(self.down(self.up(hidden[rows], e, compute_dtype), e).to(hidden.dtype))
        return torch.cat(outputs)

    def up(self, hidden: torch.Tensor, expert: int, compute_dtype: torch.dtype) -> torch.Tensor:
        """[..., hidden] rows of one expert -> [..., F] after norm, product and activation, in ``compute_dtype``."""
        x = rms_norm(hidden, self.pre_norm.of(expert)).to(compute_dtype)
        product = linear(x, self.up_gate_proj.of(expert).to(compute_dtype)).to(hidden.dtype)
        return (swiglu7(product) if self.gated else gelu7(product)).to(compute_dtype)

    def down(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """[..., F] rows of one expert -> [..., hidden] in the dtype of ``x``."""
        return linear(x, self.down_proj.of(expert).to(x.dtype))


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream, through a post-norm in the layers that have one."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.attention = Attention(config, layer, dtype, device)
        self.mlp = MLP(config, layer, dtype, device)
        self.post_norm = layer in config.post_norm_layers
        if self.post_norm:
            size = (config.experts(layer), config.hidden_size)
            self.attn_post_norm = Weight(*size, dtype=torch.float32, device=device)
            self.mlp_post_norm = Weight(*size, dtype=torch.float32, device=device)

    def forward(self, hidden: torch.Tensor, given: Pass) -> torch.Tensor:
        """[N, hidden] -> [N, hidden] in the stream's dtype; over ranks the rows of this rank."""
        # No name holds a branch: 1.3 GB at 1080p that would stay alive through the MLP.
        hidden = self.add(hidden, self.attention(hidden, given), "attn_post_norm", given.clip)
        return self.add(hidden, self.mlp(hidden, given.clip, given.compute_dtype), "mlp_post_norm", given.clip)

    def add(self, hidden: torch.Tensor, branch: torch.Tensor, post_norm: str, clip: Clip) -> torch.Tensor:
        """The residual stream [N, hidden] plus a branch, which goes through the named norm where the layer has one."""
        return hidden + (normed(branch, getattr(self, post_norm), clip) if self.post_norm else branch)


def _extended(x: torch.Tensor, share: RowShare) -> torch.Tensor:
    """[rows of the sequence, ...] -> [rows held, ...], zeros for dummies."""
    missing = share.count - len(x)
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def normed(x: torch.Tensor, norm: Weight, clip: Clip) -> torch.Tensor:
    """RMSNorm of [N, hidden], every token by its expert's weight, in the dtype of ``x``."""
    chunks = sequence.row_chunks(clip, norm.experts, ROW_CHUNK)
    return torch.cat([rms_norm(x[rows], norm.of(e)) for e, rows in chunks])


class Rope(nn.Module):
    """Holds the rotary frequencies under the key the published checkpoints use."""

    bands: torch.Tensor

    def __init__(self, head_dim: int, device: torch.device | None) -> None:
        super().__init__()
        self.register_buffer("bands", frequency_bands(head_dim, device))


def _linear(inputs: int, outputs: int, device: torch.device | None, *, bias: bool = True) -> nn.Linear:
    """A float32 linear layer that starts at zero, as every other weight; torch's own start draws random numbers."""
    made = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=torch.float32)
    for name, like in list(made.named_parameters()):
        setattr(made, name, nn.Parameter(torch.zeros(like.shape, dtype=torch.float32, device=device)))
    return made


class Adapter(nn.Module):
    """Float32 embedders of the three modalities, and the rotary frequencies."""

    def __init__(self, config: ModelConfig, device: torch.device | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.video_embedder = _linear(config.video_in_channels, width, device)
        self.text_embedder = _linear(config.text_in_channels, width, device)
        self.audio_embedder = _linear(config.audio_in_channels, width, device)
        self.rope = Rope(config.head_dim, device)


class Block(nn.Module):
    """The stack of layers, under the key ``block.layers``."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))


LayerHook = Callable[[int, torch.Tensor], None]


class HappyHorse(nn.Module):
    """Joint audio-video denoiser. Predicts the velocity of a video and an audio latent from both and a text.

    Args:
        config: Sizes and layer kinds.
        compute_dtype: Dtype of products and attention: bfloat16 as published, float32 for the exact meaning, float64
            as a reference for both. The residual stream is float32 (float64 with float64).
        param_dtype: Dtype of the linear weights inside layers; bfloat16 as published, float32 to train.
        device: Where to make the parameters; ``"meta"`` allocates nothing.

    Weights start at zero: call :meth:`init_weights` for seeded random ones, or load a checkpoint.

    Raises:
        TypeError: ``config`` is not a ModelConfig.
        ValueError: ``compute_dtype`` is none of the three.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.bfloat16,
        *,
        param_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
        if compute_dtype not in COMPUTE_DTYPES:
            allowed = ", ".join(map(str, COMPUTE_DTYPES))
            raise ValueError(f"compute_dtype must be one of {allowed}; got {compute_dtype}")
        where = torch.device(device) if device is not None else None
        self.config = config
        self.compute_dtype = compute_dtype
        self.ranks: Ranks | None = None
        self.adapter = Adapter(config, where)
        self.block = Block(config, param_dtype, where)
        self.final_norm_video = Weight(1, config.hidden_size, dtype=torch.float32, device=where)
        self.final_norm_audio = Weight(1, config.hidden_size, dtype=torch.float32, device=where)
        self.final_linear_video = _linear(config.hidden_size, config.video_in_channels, where, bias=False)
        self.final_linear_audio = _linear(config.hidden_size, config.audio_in_channels, where, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.final_norm_video.weight.device

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the residual stream, norms, embedders and heads."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def init_weights(self, seed: int) -> HappyHorse:
        """Seeded random weights: matrices ~ N(0, 1/fan_in), norms ~ N(0, 0.2^2) around their stored 0, small biases.

        Made on the device the parameters are on; the same seed gives the same weights on the same kind of device.

        Returns:
            The model itself.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else 25 if "norm" in name else 100
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
        return self

    @ambient.independent
    def forward(
        self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, *, on_layer: LayerHook | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of one clip.

        Args:
            video: [1, C, T, H, W] noisy latent, H and W even.
            audio: [1, A, Ca] noisy latent.
            text: [1, L, Ct] embedding of the prompt.
            on_layer: Called with (layer, residual stream [N, hidden]) after every layer.

        torch's settings do not reach it (TF32 and the like, autocast, default device and dtype, attention kernels):
        float32 products are in float32. A backward pass follows them.

        Returns:
            video [1, C, T, H, W] and audio [1, A, Ca] velocities in the stream's dtype.

        Raises:
            TypeError, ValueError, NonFiniteError: As :func:`happyhorse_fast.eager.sequence.check_inputs`.
        """
        inputs: dict[str, Any] = {"video": video, "audio": audio, "text": text, "on_layer": on_layer}
        with nullcontext() if self.ranks is None else self.ranks.call(**inputs):
            clip = sequence.check_inputs(self.config, video, audio, text, self.device)
            ranks, rank = (1, 0) if self.ranks is None else (self.ranks.size, self.ranks.rank)
            share = RowShare(clip.total, ranks=ranks, rank=rank)
            ulysses = None if self.ranks is None else Ulysses(self.ranks, share)
            here = clip if ulysses is None else sequence.held_tokens(clip, share)
            coords = sequence.coordinates(clip, self.config.coords_style, self.device)[share.first : share.end]
            phases = _extended(rotary_phases(coords, self.adapter.rope.bands).to(self.stream_dtype), share)
            hidden = _extended(self._embed(video, audio, text, clip, share), share)
            dense = sequence.dense_ranges(clip)
            local = sequence.local_ranges(clip, self.config.frame_receptive_field)
            for i, layer in enumerate(self.block.layers):
                ranges = local if self.config.is_local(i, clip.frame_tokens) else dense
                gather(self.block.layers, i)
                hidden = layer(hidden, Pass(phases, here, ranges, self.compute_dtype, ulysses))
                if on_layer is not None:
                    on_layer(i, self._every(hidden, share, slice(0, clip.total)))
            rows, whole = here.slices(), clip.slices()
            video_out = self._head(hidden[rows[0]], self.final_norm_video, self.final_linear_video)
            audio_out = self._head(hidden[rows[1]], self.final_norm_audio, self.final_linear_audio)
            video_out, audio_out = self._every(video_out, share, whole[0]), self._every(audio_out, share, whole[1])
            return sequence.unpatchify(video_out, clip), audio_out.unsqueeze(0)

    def _embed(
        self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, clip: Clip, share: RowShare
    ) -> torch.Tensor:
        dtype = self.stream_dtype
        parts = (
            (sequence.patchify(video), self.adapter.video_embedder),
            (audio[0], self.adapter.audio_embedder),
            (text[0], self.adapter.text_embedder),
        )
        held = [share.within(rows.start, rows.stop) for rows in clip.slices()]
        here = [(x[rows].to(dtype), m) for (x, m), rows in zip(parts, held, strict=True)]
        return torch.cat([linear(x, m.weight.to(dtype), m.bias.to(dtype)) for x, m in here])

    def _every(self, x: torch.Tensor, share: RowShare, rows: slice) -> torch.Tensor:
        """Some of the sequence's rows from every rank: this one's may be followed by dummies."""
        if self.ranks is None:
            return x
        held = [share.of(rank).within(rows.start, rows.stop) for rank in range(share.ranks)]
        counts = [part.stop - part.start for part in held]
        return self.ranks.gather(x[: counts[share.rank]], counts)

    def _head(self, hidden: torch.Tensor, norm: Weight, projection: nn.Linear) -> torch.Tensor:
        weight = projection.weight.to(hidden.dtype)
        # Not by split, which fake tensors of torch 2.11 do not have of no rows.
        parts = [hidden[first : first + ROW_CHUNK] for first in range(0, max(1, len(hidden)), ROW_CHUNK)]
        return torch.cat([linear(rms_norm(part, norm.weight), weight) for part in parts])
