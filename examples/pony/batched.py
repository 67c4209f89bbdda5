"""The reference model over a batch of clips: the same functions and rounding points, for training.

Inference takes one clip. Here the clips of a batch share every product, and attention runs through PyTorch's fused
kernel, under which the frame window is a mask. ``tests/pony/test_pony.py`` holds it against the reference.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.model import HappyHorse, Layer
from happyhorse_fast.eager.qkv import rms_norm, rmsnorm_qkv
from happyhorse_fast.eager.rotary import rotary_phases
from happyhorse_fast.eager.sequence import Clip, Ranges

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""video [B, C, T, H, W], audio [B, A, Ca], text [B, L, Ct]."""


def mask_of(ranges: Ranges, total: int) -> torch.Tensor:
    """[N, N] bool: whether a query (row) attends to a key."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    for q0, q1, k0, k1 in ranges:
        mask[q0:q1, k0:k1] = True
    return mask


class BatchedHappyHorse(torch.nn.Module):
    """A model's forward over batches of clips of one shape.

    Args:
        model: Its parameters are used, not copied.
        clip: Token grid of every clip.
    """

    phases: torch.Tensor
    window: torch.Tensor

    def __init__(self, model: HappyHorse, clip: Clip) -> None:
        super().__init__()
        self.model = model
        self.clip = clip
        config = model.config
        coords = sequence.coordinates(clip, config.coords_style)
        self.register_buffer("phases", rotary_phases(coords, model.adapter.rope.bands))
        self.register_buffer("window", mask_of(sequence.local_ranges(clip, config.frame_receptive_field), clip.total))

    def forward(
        self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities [B, C, T, H, W] and [B, A, Ca]; shapes of the arguments as in :data:`Batch`."""
        model, adapter = self.model, self.model.adapter
        tokens = torch.stack([sequence.patchify(v[None]) for v in video])
        hidden = torch.cat(
            [adapter.video_embedder(tokens), adapter.audio_embedder(audio), adapter.text_embedder(text)], dim=1
        )
        for i, layer in enumerate(model.block.layers):
            local = model.config.is_local(i, self.clip.frame_tokens)
            hidden = self._layer(layer, hidden, self.window if local else None)
        video_rows, audio_rows, _ = self.clip.slices()
        video_out = model.final_linear_video(rms_norm(hidden[:, video_rows], model.final_norm_video.weight))
        audio_out = model.final_linear_audio(rms_norm(hidden[:, audio_rows], model.final_norm_audio.weight))
        return torch.cat([sequence.unpatchify(v, self.clip) for v in video_out]), audio_out

    def _layer(self, layer: Layer, hidden: torch.Tensor, window: torch.Tensor | None) -> torch.Tensor:
        """[B, N, hidden] -> [B, N, hidden]."""
        attention, dtype = layer.attention, self.model.compute_dtype
        batch = len(hidden)
        spans = list(enumerate(self.clip.slices())) if attention.pre_norm.experts > 1 else [(0, slice(None))]
        parts = []
        for e, rows in spans:
            x = hidden[:, rows]
            made = rmsnorm_qkv(
                x.flatten(0, 1),
                attention.pre_norm.of(e),
                attention.linear_qkv.of(e),
                attention.q_norm.of(e),
                attention.k_norm.of(e),
                self.phases[rows].repeat(batch, 1),
                compute_dtype=dtype,
                **attention.heads,
            )
            parts.append([part.unflatten(0, (batch, x.shape[1])) for part in made])
        q, k, v, gate = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=window, enable_gqa=True).transpose(1, 2)
        gated = attention.gated(attended, torch.sigmoid(gate))
        branch = torch.cat([attention.project(gated[:, rows], e) for e, rows in spans], dim=1)
        hidden = hidden + branch.to(hidden.dtype)
        mlp = layer.mlp
        branch = torch.cat([mlp.down(mlp.up(hidden[:, rows], e, dtype), e) for e, rows in spans], dim=1)
        return hidden + branch.to(hidden.dtype)
