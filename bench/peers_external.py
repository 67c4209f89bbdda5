"""Peers from other projects. Each is imported when it is first prepared, never before."""

from __future__ import annotations

import torch

from bench.cases import Case, padded_rows
from bench.peers import ATTENTION, NORM, Function, Inputs, Peer, missing, needs_gpu
from happyhorse_fast.reference.rmsnorm_qkv import EPS
from happyhorse_fast.reference.sequence import dense_ranges, local_ranges


class DenseAttention(Peer):
    """A peer that attends densely, without the gate."""

    ops = ATTENTION
    module: str

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing(self.module)

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.part == "dense"


class FlashAttention3(DenseAttention):
    """FlashAttention-3 in bf16, from the hopper folder of Dao-AILab/flash-attention: q, k, v [B, N, H, D]."""

    name, module = "FlashAttention-3 bf16 (no gate)", "flash_attn_interface"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from flash_attn_interface import flash_attn_func

        q, k, v = (inputs.bf16[name][None] for name in "qkv")
        return lambda: flash_attn_func(q, k, v, softmax_scale=inputs.bf16["scale"], causal=False)


class FlashAttention3Fp8(DenseAttention):
    """The same on e4m3 codes, with one descale per batch entry and key/value head."""

    name, module = "FlashAttention-3 fp8 (no gate)", "flash_attn_interface"

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.precision == "fp8"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from flash_attn_interface import flash_attn_func

        q, k, v = (inputs.bf16[name][None].to(torch.float8_e4m3fn) for name in "qkv")
        scales = {f"{x}_descale": torch.ones(1, k.shape[2], device=inputs.device) for x in "qkv"}
        return lambda: flash_attn_func(q, k, v, softmax_scale=inputs.bf16["scale"], causal=False, **scales)


class FlashInferDense(DenseAttention):
    """flashinfer's prefill of one request: q [N, Hq, D], k and v [M, Hkv, D]."""

    name, module = "flashinfer dense bf16 (no gate)", "flashinfer"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import flashinfer

        q, k, v = (inputs.bf16[name] for name in "qkv")
        return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False, sm_scale=inputs.bf16["scale"])


class FlashInferSparse(Peer):
    """flashinfer's block-sparse wrapper on the map's blocks; partial blocks count as full ones."""

    name = "flashinfer block-sparse bf16 (partial blocks as full, no gate)"
    ops = ATTENTION
    WORKSPACE = 128 << 20

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing("flashinfer")

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.part == "window"  # one map for all heads

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import flashinfer

        given = inputs.bf16
        q, k, v, block_map = given["q"], given["k"], given["v"], given["block_map"]
        full, ids = (x[0] for x in block_map.to_blocks())
        blocks = full | (ids >= 0)
        indptr = torch.nn.functional.pad(blocks.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        wrapper = flashinfer.BlockSparseAttentionWrapper(
            torch.empty(self.WORKSPACE, dtype=torch.uint8, device=inputs.device)
        )
        sizes = (len(q), len(k), 128, 128, q.shape[1], k.shape[1], q.shape[2])
        wrapper.plan(indptr, blocks.nonzero()[:, 1].to(torch.int32), *sizes, q_data_type=torch.bfloat16)
        return lambda: wrapper.run(q, k, v)


class SageAttention(DenseAttention):
    """sageattention's own choice of int8 and fp8 kernels, which quantise in the call: q, k, v [B, N, H, D]."""

    name, module = "sageattention (no gate)", "sageattention"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from sageattention import sageattn

        q, k, v = (inputs.bf16[name][None] for name in "qkv")
        return lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=inputs.bf16["scale"])


class MagiAttention(Peer):
    """MagiAttention's flexible flash attention over token ranges, what the public model runs; without the gate."""

    name = "MagiAttention bf16 (no gate)"
    ops = ATTENTION

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing("magi_attention")

    def fits(self, case: Case) -> bool:
        return super().fits(case) and case.keep is None

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from magi_attention.api import flex_flash_attn_func

        grid, config = case.size.grid, case.size.config
        ranges = local_ranges(grid, config.frame_receptive_field) if case.part == "window" else dense_ranges(grid)
        table = torch.tensor(ranges, dtype=torch.int32, device=inputs.device)
        rows = padded_rows(case.size).token_rows(inputs.device)
        q, k, v = (inputs.bf16[name][rows] for name in "qkv")
        q_ranges, k_ranges = table[:, :2].contiguous(), table[:, 2:].contiguous()
        full = torch.zeros(len(table), dtype=torch.int32, device=inputs.device)
        return lambda: flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map=full)


class Quack(Peer):
    """quack's RMSNorm, bf16 out, without the e4m3 codes."""

    name = "quack rmsnorm (no quantisation)"
    ops = NORM

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing("quack")

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from quack import rmsnorm

        x = inputs.bf16["hidden"].bfloat16()  # quack writes what it reads: the stream would be float32 out
        weight = inputs.bf16["norm_weight"][0] + 1
        return lambda: rmsnorm(x, weight, eps=EPS)


class Liger(Peer):
    """Liger's RMSNorm on a bf16 copy of the stream, without the e4m3 codes."""

    name = "liger-kernel rmsnorm (no quantisation)"
    ops = NORM

    def available(self, device: torch.device) -> str | None:
        return needs_gpu(device) or missing("liger_kernel")

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        x = inputs.bf16["hidden"].bfloat16()
        module = LigerRMSNorm(x.shape[1], eps=EPS, offset=1.0, casting_mode="gemma", init_fn="zeros", in_place=False)
        module = module.to(inputs.device)

        def run() -> object:
            with torch.no_grad():
                return module(x)

        return run


PEERS: tuple[Peer, ...] = (
    FlashAttention3(),
    FlashAttention3Fp8(),
    FlashInferDense(),
    FlashInferSparse(),
    SageAttention(),
    MagiAttention(),
    Quack(),
    Liger(),
)
