"""Peers from other projects. Each is imported when it is first prepared, never before."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from bench.cases import Case, padded_rows, token_ranges
from bench.peers.peer import ATTENTION, NORM, WITHOUT_GATE, Function, Inputs, Peer
from happyhorse_fast.block_map import BLOCK
from happyhorse_fast.eager.qkv import EPS


class DenseAttention(Peer):
    """A peer that attends densely, without the gate."""

    ops, parts = WITHOUT_GATE, ("dense",)


class FlashAttention3(DenseAttention):
    """FlashAttention-3 in bf16, from the hopper folder of Dao-AILab/flash-attention: q, k, v [B, N, H, D]."""

    name, module = "FlashAttention-3 bf16 (no gate)", "flash_attn_interface"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        attend = importlib.import_module(self.module).flash_attn_func
        q, k, v = (inputs.bf16[name][None] for name in "qkv")
        return lambda: attend(q, k, v, softmax_scale=inputs.bf16["scale"], causal=False)


class FlashAttention3Fp8(FlashAttention3):
    """The same on e4m3 codes, with one descale per batch entry and key/value head."""

    name, precisions = "FlashAttention-3 fp8 (no gate)", ("fp8",)

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from flash_attn_interface import flash_attn_func

        q, k, v = (inputs.bf16[name][None].to(torch.float8_e4m3fn) for name in "qkv")
        scales = {f"{x}_descale": torch.ones(1, k.shape[2], device=inputs.device) for x in "qkv"}
        return lambda: flash_attn_func(q, k, v, softmax_scale=inputs.bf16["scale"], causal=False, **scales)


class FlashAttention4(FlashAttention3):
    """FlashAttention-4 in bf16, written in CuTe DSL, its kernels for Hopper included: q, k, v [B, N, H, D]."""

    name, module, package = "FlashAttention-4 bf16 (no gate)", "flash_attn.cute", "flash-attn-4"
    slow = True  # compiles its kernels


class CudnnFp8(DenseAttention):
    """cuDNN's attention on e4m3 codes with a scale per tensor, e4m3 out: q, k, v [B, H, N, D], any strides.

    torch has no call of it; nvidia-cudnn-frontend does, and is no part of a torch installation.
    """

    name, precisions = "cuDNN fp8 (no gate)", ("fp8",)
    module, package = "cudnn", "nvidia-cudnn-frontend"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import cudnn

        e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(inputs.device).cuda_stream)
        graph = cudnn.pygraph(
            io_data_type=e4m3, intermediate_data_type=float32, compute_data_type=float32, handle=handle
        )
        given = [inputs.bf16[name].to(torch.float8_e4m3fn).transpose(0, 1)[None] for name in "qkv"]
        one = torch.ones(1, 1, 1, 1, device=inputs.device)
        scalar = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": float32}
        tensors = [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=e4m3) for x in given]
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        scales = {name: graph.tensor(**scalar) for name in names}
        out, _, *largest = graph.sdpa_fp8(
            **dict(zip("qkv", tensors, strict=True)),
            **scales,
            generate_stats=False,
            attn_scale=float(inputs.bf16["scale"]),
            use_causal_mask=False,
        )
        result = torch.empty_like(given[0])
        out.set_output(True).set_dim(list(result.shape)).set_stride(list(result.stride())).set_data_type(e4m3)
        found = [torch.empty_like(one) for _ in largest]
        for amax in largest:
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(float32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=inputs.device)
        pack = dict(zip([*tensors, out, *largest], [*given, result, *found], strict=True))
        pack |= dict.fromkeys(scales.values(), one)

        def run() -> Tensor:
            graph.execute(pack, workspace, handle=handle)
            return result

        return run


class FlashInferDense(DenseAttention):
    """flashinfer's prefill of one request: q [N, Hq, D], k and v [M, Hkv, D]."""

    name, module = "flashinfer dense bf16 (no gate)", "flashinfer"
    slow = True  # compiles its kernels with nvcc

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import flashinfer

        q, k, v = (inputs.bf16[name] for name in "qkv")
        return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False, sm_scale=inputs.bf16["scale"])


class FlashInferBlocks(Peer):
    """A peer on the map's blocks, of which partial ones count as full."""

    ops = ATTENTION
    module, slow = "flashinfer", True
    WORKSPACE = 128 << 20  # what its documentation recommends

    def workspace(self, inputs: Inputs) -> Tensor:
        """The buffer that a wrapper is made with."""
        return torch.empty(self.WORKSPACE, dtype=torch.uint8, device=inputs.device)

    def blocks(self, inputs: Inputs) -> Tensor:
        """bool [heads of the map, query blocks, key blocks]."""
        full, ids = inputs.bf16["block_map"].to_blocks()
        return full | (ids >= 0)


class FlashInferSparse(FlashInferBlocks):
    """flashinfer's block-sparse wrapper: one map for all heads; q [N, Hq, D], k and v [M, Hkv, D]."""

    name, parts = "flashinfer block-sparse bf16 (partial blocks as full, no gate)", ("window",)

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import flashinfer

        given = inputs.bf16
        q, k, v = (given[name] for name in "qkv")
        blocks = self.blocks(inputs)[0]
        indptr = torch.nn.functional.pad(blocks.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        wrapper = flashinfer.BlockSparseAttentionWrapper(self.workspace(inputs))
        wrapper.plan(
            indptr,
            blocks.nonzero()[:, 1].to(torch.int32),
            *(len(q), len(k), BLOCK, BLOCK, q.shape[1], k.shape[1], q.shape[2]),
            sm_scale=given["scale"],
            q_data_type=torch.bfloat16,
            o_data_type=torch.bfloat16,  # float16 by default
        )
        return lambda: wrapper.run(q, k, v)


class FlashInferVariable(FlashInferBlocks):
    """flashinfer's variable block-sparse wrapper: a map per key/value head; q [Hq, N, D], k and v [Hkv, M, D]."""

    name, parts = "flashinfer variable block-sparse bf16 (no gate)", ("25%", "12.5%")

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        import flashinfer

        given = inputs.bf16
        q, k, v = (given[name].transpose(0, 1).contiguous() for name in "qkv")
        blocks = self.blocks(inputs).expand(len(k), -1, -1)
        sizes = torch.full(blocks.shape[:2], BLOCK, dtype=torch.int32, device=inputs.device)
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(self.workspace(inputs))
        heads = (len(q), len(k), q.shape[2])
        wrapper.plan(blocks, sizes, sizes, *heads, sm_scale=given["scale"], q_data_type=torch.bfloat16)
        return lambda: wrapper.run(q, k, v)


class SageAttention(DenseAttention):
    """sageattention's own choice of int8 and fp8 kernels, which quantise in the call: q, k, v [B, N, H, D]."""

    name, module = "sageattention (no gate)", "sageattention"

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from sageattention import sageattn

        # Version 1 subtracts the mean of k in place.
        q, k, v = (inputs.bf16[name][None].clone() for name in "qkv")
        return lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=inputs.bf16["scale"])


class MagiAttention(Peer):
    """MagiAttention's flexible flash attention over token ranges, what the public model runs; without the gate."""

    name, module = "MagiAttention bf16 (no gate)", "magi_attention"
    ops, parts = ATTENTION, ("window", "dense")
    slow = True  # compiles its kernels with nvcc

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from magi_attention.api import flex_flash_attn_func

        table = torch.tensor(token_ranges(case.size, case.part == "window"), dtype=torch.int32, device=inputs.device)
        rows = padded_rows(case.size).token_rows(inputs.device)
        q, k, v = (inputs.bf16[name][rows] for name in "qkv")
        q_ranges, k_ranges = table[:, :2].contiguous(), table[:, 2:].contiguous()
        full = torch.zeros(len(table), dtype=torch.int32, device=inputs.device)
        return lambda: flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map=full)


class Quack(Peer):
    """quack's RMSNorm, float32 in and bf16 out as ours, without the e4m3 codes."""

    name, module = "quack rmsnorm (no quantisation)", "quack"
    ops = NORM
    slow = True

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from quack import rmsnorm

        x, weight = inputs.bf16["hidden"], inputs.bf16["norm_weight"][0] + 1
        return lambda: rmsnorm(x, weight, out_dtype=torch.bfloat16, eps=EPS)


class Liger(Peer):
    """Liger's RMSNorm, without the e4m3 codes. It writes what it reads: on a bf16 copy it moves 4 bytes of our 6."""

    name, module = "liger-kernel rmsnorm (bf16 stream, no quantisation)", "liger_kernel"
    ops = NORM

    def prepare(self, case: Case, inputs: Inputs) -> Function:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        x, weight = inputs.bf16["hidden"].bfloat16(), inputs.bf16["norm_weight"][0]
        module = LigerRMSNorm(x.shape[1], eps=EPS, offset=1.0, casting_mode="gemma", init_fn="zeros", in_place=False)
        module = module.to(inputs.device)

        def run() -> object:
            with torch.no_grad():
                return module(x)

        with torch.no_grad():
            module.weight.copy_(weight)
        return run
