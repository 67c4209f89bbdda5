"""Peers on stand-ins that have their public signatures and compute what their documentation says: our calls are right.

The signatures are those of FlashAttention-3 (hopper/, July 2026), flashinfer 0.7.2, sageattention 1.0.6 and 2.2,
MagiAttention 1.1, quack 0.6.5, liger-kernel 0.8.5 and torchao 0.18. A call that one of them would refuse costs GPU
minutes to find.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import cases, padded_rows, select
from bench.measure.gates import row_mask
from bench.peers.external import (
    CudnnFp8,
    FlashAttention3,
    FlashAttention3Fp8,
    FlashInferDense,
    FlashInferSparse,
    FlashInferVariable,
    Liger,
    MagiAttention,
    Quack,
    SageAttention,
)
from bench.peers.peer import Inputs
from bench.peers.torch import TorchAO
from happyhorse_fast.eager.qkv import rms_norm

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """[N, Hq, D] in float32; mask bool [Hkv or 1, N, M]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(q.shape[1] // len(mask), dim=0), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).nan_to_num(), v)


def of_blocks(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)


@pytest.fixture
def install(monkeypatch):
    def into(name: str, **members: Any) -> None:
        for i in range(name.count(".")):  # the packages above it
            above = ".".join(name.split(".")[: i + 1])
            monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return into


def not_compiled(monkeypatch):
    """torch.compile as the identity, but where torch itself calls it: 10 to 30 s a call on a CPU."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic=None, **more: real(function, **more) if more else function
    )


def case_of(words: str) -> Any:
    (case,) = select(cases("tiny"), words)
    return case


def close(result: Any, exact: Tensor, *, within: float = 1e-2) -> bool:
    assert isinstance(result, Tensor) and result.shape == exact.shape, (result.shape, exact.shape)
    return float((result.double() - exact.double()).norm() / exact.double().norm()) < within


def exact(inputs: Inputs, *, masked: bool) -> Tensor:
    given = inputs.bf16
    mask = None
    if masked:
        found, rows = given["block_map"], len(given["q"]) // 128
        mask = torch.stack([torch.cat([row_mask(found, h, r) for r in range(rows)]) for h in range(found.heads)])
    return attend(given["q"], given["k"], given["v"], mask, given["scale"])


# FlashAttention-3 -----------------------------------------------------------------------------------------------------


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert not causal and q.dim() == 4 and q.shape[2] % k.shape[2] == 0
    for descale in (q_descale, k_descale, v_descale):
        assert (descale is not None) == (q.dtype == torch.float8_e4m3fn)
        assert descale is None or (descale.shape == (len(k), k.shape[2]) and descale.dtype == torch.float32)
    return attend(q[0], k[0], v[0], None, softmax_scale).to(BF16)[None]


@pytest.mark.parametrize(("peer", "within"), [(FlashAttention3(), 1e-2), (FlashAttention3Fp8(), 0.2)])
def test_flash_attention_3(peer, within, install):
    install("flash_attn_interface", flash_attn_func=flash_attn_func)
    case = case_of("sparse_attention-dense/tiny/fp8")
    inputs = Inputs(case, CPU)
    assert peer.fits(case) and not peer.fits(case_of("window/tiny/fp8"))
    assert close(peer.prepare(case, inputs)()[0], exact(inputs, masked=False), within=within)


# cuDNN ----------------------------------------------------------------------------------------------------------------


class CudnnTensor:
    def __init__(self, **given):
        self.given = given

    def __getattr__(self, name):  # set_output, set_dim, set_stride, set_data_type
        assert name.startswith("set_")
        return lambda value: self.given.update({name.removeprefix("set_"): value}) or self


class CudnnGraph:
    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        self.built = []

    def tensor(self, dim, stride, data_type, name=""):
        assert isinstance(dim, list) and len(dim) == 4 and isinstance(stride, list)
        return CudnnTensor(dim=dim, stride=stride)

    def sdpa_fp8(
        self, q, k, v, descale_q, descale_k, descale_v, descale_s, scale_s, scale_o, attn_scale=None,
        use_causal_mask=False, generate_stats=None, name="",
    ):  # fmt: skip
        assert isinstance(attn_scale, float) and not use_causal_mask and generate_stats is False
        self.scale, self.inputs = attn_scale, (q, k, v)
        self.outputs = CudnnTensor(), None, CudnnTensor(), CudnnTensor()
        return self.outputs

    def __getattr__(self, name):
        return lambda *_: self.built.append(name)

    def get_workspace_size(self):
        return 16

    def execute(self, pack, workspace, handle):
        wanted = "validate build_operation_graph create_execution_plans check_support build_plans"
        assert self.built == wanted.split() and len(pack) == 12 and workspace.numel() == 16
        for tensor, value in pack.items():
            assert tensor.given["dim"] == list(value.shape) and tensor.given["stride"] == list(value.stride())
        q, k, v = (pack[x][0].transpose(0, 1) for x in self.inputs)
        out = attend(q.float(), k.float(), v.float(), None, self.scale)
        pack[self.outputs[0]].copy_(out.transpose(0, 1)[None])


def test_cudnn_fp8(install, monkeypatch):
    kind, mode = types.SimpleNamespace(FP8_E4M3=1, FLOAT=2), types.SimpleNamespace(A=1, FALLBACK=2)
    assert CudnnFp8().available(torch.device("cuda")) == "nvidia-cudnn-frontend is not installed"
    install(
        "cudnn", data_type=kind, heur_mode=mode, pygraph=CudnnGraph, create_handle=object,
        set_stream=lambda handle, stream: None,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    case = case_of("sparse_attention-dense/tiny/fp8")
    inputs = Inputs(case, CPU)
    assert CudnnFp8().fits(case) and not CudnnFp8().fits(case_of("sparse_attention-dense/tiny/bf16"))
    result = CudnnFp8().prepare(case, inputs)()[0].transpose(0, 1)
    assert close(result, exact(inputs, masked=False), within=0.2)


# flashinfer -----------------------------------------------------------------------------------------------------------


def single_prefill_with_kv_cache(
    q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None,
    causal=False, kv_layout="NHD", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None,
    window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
):  # fmt: skip
    assert not causal and q.dim() == 3 and kv_layout == "NHD"
    return attend(q, k, v, None, sm_scale).to(q.dtype)


class Wrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8


class BlockSparseAttentionWrapper(Wrapper):
    def plan(
        self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None, packed_mask=None,
        causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type="float16",
        non_blocking=True,
    ):  # fmt: skip
        assert M % R == 0 and N % C == 0 and indptr.dtype == indices.dtype == torch.int32
        assert indptr.tolist()[0] == 0 and int(indptr[-1]) == len(indices)
        self.heads, self.scale, self.dtypes = (
            (num_qo_heads, num_kv_heads, head_dim),
            sm_scale,
            (q_data_type, o_data_type),
        )
        blocks = torch.zeros(1, M // R, N // C, dtype=torch.bool)
        for row in range(M // R):
            blocks[0, row, indices[int(indptr[row]) : int(indptr[row + 1])].long()] = True
        self.mask = of_blocks(blocks)

    def run(self, q, k, v, scale_q=None, scale_k=None, scale_v=None, out=None, lse=None, return_lse=False):
        assert (q.shape[1], k.shape[1], q.shape[2]) == self.heads and self.dtypes == (q.dtype, q.dtype)
        return attend(q, k, v, self.mask, self.scale).to(self.dtypes[1])


class VariableBlockSparseAttentionWrapper(Wrapper):
    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert block_mask_map.dtype == torch.bool and block_row_sz.dtype == block_col_sz.dtype == torch.int32
        assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
        assert (block_row_sz == 128).all() and (block_col_sz == 128).all()
        self.mask, self.scale, self.heads, self.dtype = of_blocks(block_mask_map), sm_scale, num_kv_heads, q_data_type

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        assert len(k) == self.heads and q.dtype == self.dtype and q.is_contiguous()
        return attend(*(x.transpose(0, 1) for x in (q, k, v)), self.mask, self.scale).to(q.dtype).transpose(0, 1)


FLASHINFER = {
    "single_prefill_with_kv_cache": single_prefill_with_kv_cache,
    "BlockSparseAttentionWrapper": BlockSparseAttentionWrapper,
    "VariableBlockSparseAttentionWrapper": VariableBlockSparseAttentionWrapper,
}


def test_flashinfer_dense(install):
    install("flashinfer", **FLASHINFER)
    case = case_of("sparse_attention-dense/tiny/bf16")
    inputs = Inputs(case, CPU)
    assert close(FlashInferDense().prepare(case, inputs)(), exact(inputs, masked=False))


@pytest.mark.parametrize(
    ("peer", "fitting", "other"),
    [
        (FlashInferSparse(), "window/tiny/bf16", "attention-25%"),
        (FlashInferVariable(), "attention-25%/tiny/bf16", "window"),
    ],
)
def test_flashinfer_on_the_maps_blocks(peer, fitting, other, install):
    install("flashinfer", **FLASHINFER)
    case = case_of(fitting)
    inputs = Inputs(case, CPU)
    assert peer.fits(case) and not any(peer.fits(c) for c in select(cases("tiny"), other))
    full, ids = inputs.bf16["block_map"].to_blocks()
    given = inputs.bf16
    wanted = attend(given["q"], given["k"], given["v"], of_blocks(full | (ids >= 0)), given["scale"])
    result = peer.prepare(case, inputs)()
    assert close(result if isinstance(peer, FlashInferSparse) else result.transpose(0, 1), wanted)
    assert not close(exact(inputs, masked=False), wanted, within=0.05), "the map leaves something out"


# The others -----------------------------------------------------------------------------------------------------------


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not is_causal and not return_lse and not kwargs
    k -= k.mean(dim=1, keepdim=True)  # version 1 changes its argument
    return attend(q[0], k[0], v[0], None, sm_scale).to(q.dtype)[None]


def test_sageattention_and_that_its_change_of_k_reaches_no_other_peer(install):
    install("sageattention", sageattn=sageattn)
    case = case_of("sparse_attention-dense/tiny/bf16")
    inputs = Inputs(case, CPU)
    before = inputs.bf16["k"].clone()
    result = SageAttention().prepare(case, inputs)()
    assert close(result[0], exact(inputs, masked=False), within=2e-2)
    assert torch.equal(inputs.bf16["k"], before)


def flex_flash_attn_func(
    q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, sink=None, softmax_scale=None, softcap=0.0,
    deterministic=False, sm_margin=0, disable_fwd_atomic_reduction=False, max_seqlen_q=None, range_merge=False,
):  # fmt: skip
    assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32 and not attn_type_map.any()
    assert q_ranges.shape == k_ranges.shape == (len(attn_type_map), 2) and q_ranges.is_contiguous()
    mask = torch.zeros(1, len(q), len(k), dtype=torch.bool)
    for (first, end), (start, stop) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        mask[0, first:end, start:stop] = True
    return attend(q, k, v, mask, softmax_scale).to(q.dtype), None


@pytest.mark.parametrize("part", ["window", "dense"])
def test_magi_attention(part, install):
    install("magi_attention.api", flex_flash_attn_func=flex_flash_attn_func)
    case = case_of(f"sparse_attention-{part}/tiny/bf16")
    inputs = Inputs(case, CPU)
    tokens = padded_rows(case.size).token_rows()
    assert close(MagiAttention().prepare(case, inputs)()[0], exact(inputs, masked=True)[tokens])


def rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
    weight_offset=0.0,
):  # fmt: skip
    x32 = x.float()
    return (x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + weight_offset)).to(
        out_dtype or x.dtype
    )


class LigerRMSNorm(torch.nn.Module):
    def __init__(
        self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=True, row_mode=None,
        elementwise_affine=True,
    ):  # fmt: skip
        super().__init__()
        assert init_fn in ("ones", "zeros") and casting_mode in ("llama", "gemma", "none") and not in_place
        self.weight = torch.nn.Parameter(getattr(torch, init_fn)(hidden_size))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        return rmsnorm(x, self.weight, eps=self.eps, weight_offset=self.offset)


@pytest.mark.parametrize("peer", [Quack(), Liger()])
def test_norms(peer, install):
    install("quack", rmsnorm=rmsnorm)
    install("liger_kernel.transformers.rms_norm", LigerRMSNorm=LigerRMSNorm)
    case = case_of("quantize/tiny/bf16")
    inputs = Inputs(case, CPU)
    result = peer.prepare(case, inputs)()
    assert result.dtype == BF16 and not result.requires_grad
    assert close(result, rms_norm(inputs.bf16["hidden"], inputs.bf16["norm_weight"][0]))


def test_torchao(install, monkeypatch):
    not_compiled(monkeypatch)

    class PerRow:
        pass

    class Config:
        def __init__(self, activation_dtype=None, weight_dtype=None, granularity=None):
            assert isinstance(granularity, PerRow)

    def quantize_(model, config, filter_fn=None, device=None):
        assert isinstance(model, torch.nn.Linear) and model.weight.dtype == BF16 and isinstance(config, Config)

    install(
        "torchao.quantization", Float8DynamicActivationFloat8WeightConfig=Config, PerRow=PerRow, quantize_=quantize_
    )
    case = case_of("down/tiny/fp8")
    result = TorchAO().prepare(case, Inputs(case, CPU))()
    assert result.shape == (case.rows, case.weight_shape("down")[1]) and not result.requires_grad
