"""q, k and v of float32 in the formats that attention takes, as a check of its kernels wants them."""

from __future__ import annotations

import torch

from happyhorse_fast.block_map.bits import BLOCK


def attention_operands(fmt: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keyword arguments of `block_sparse_attention`.

    Args:
        fmt: ``"bf16"``, ``"int8_qk"`` (v in bf16) or ``"fp8"``, whose scales of q and k differ from block to block.
        q: [N, Hq, D] float32, N a multiple of 128; no row is 0.
        k: [N, Hkv, D] float32.
        v: [N, Hkv, D] float32; e4m3 becomes [Hkv, D, N], as the model's, so that the same kernel reads it.
    """
    if fmt == "bf16":
        return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
    tiles = k.unflatten(0, (-1, BLOCK))  # [S, 128, Hkv, D]
    if fmt == "int8_qk":
        q_scale, k_scale = q.abs().amax(dim=2) / 127, tiles.abs().amax(dim=(1, 3)) / 127  # [N, Hq], [S, Hkv]
        return {
            "q": (q / q_scale[..., None]).round().to(torch.int8),
            "k": (tiles / k_scale[:, None, :, None]).round().to(torch.int8).flatten(0, 1),
            "v": v.bfloat16(),
            "q_scale": q_scale,
            "k_scale": k_scale.T.contiguous(),
        }
    blocks = len(tiles)
    q_scale = torch.linspace(0.005, 0.01, blocks, dtype=torch.float32)
    k_scale = torch.linspace(0.01, 0.006, blocks, dtype=torch.float32)
    columns = v.bfloat16().float().permute(1, 2, 0).unflatten(2, (-1, BLOCK))  # [Hkv, D, S, 128]
    v_scale = columns.abs().amax(dim=(1, 3)) / 448
    return {
        "q": _codes(q.unflatten(0, (-1, BLOCK)) / q_scale[:, None, None, None]).flatten(0, 1),
        "k": _codes(tiles / k_scale[:, None, None, None]).flatten(0, 1),
        "v": _codes(columns / v_scale[:, None, :, None]).flatten(2).contiguous(),
        "q_scale": q_scale,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }


def _codes(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)
