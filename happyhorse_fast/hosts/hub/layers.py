"""Layers for `kernelize`, without a state of their own, as `kernels` asks for."""

from __future__ import annotations

from torch import Tensor, nn

from happyhorse_fast.ops.attention.sdpa import attention


class ScaledDotProductAttention(nn.Module):
    """A layer whose forward is a call of PyTorch's `scaled_dot_product_attention`."""

    has_backward: bool = False
    can_torch_compile: bool = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """See :func:`attention`, which raises where a call does not fit.

        Args:
            query: [B, Hq, N, D] bf16, D 32, 64 or 128.
            key: [B, Hkv, M, D] bf16.
            value: As ``key``.
            attn_mask: None.
            dropout_p: 0.
            is_causal: False.
            scale: Softmax scale; D^-0.5 where None.
            enable_gqa: Whether Hkv may be less than Hq.

        Returns:
            [B, Hq, N, D] bf16.
        """
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
