"""Peers on stand-ins that have their public signatures and compute what their documentation says: our calls are right.

The signatures are those of FlashAttention-4 (flash_attn/cute), nvidia-cudnn-frontend, and sageattention 1.0.6 and 2.2.
A call that one of them would refuse costs GPU minutes to find.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import cases, select
from bench.measure.gates import row_mask
from bench.peers.registry import PEERS, bf16_inputs

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


def peer_of(name: str) -> Any:
    (peer,) = (peer for peer in PEERS if peer.name.startswith(name))
    return peer


def case_of(words: str) -> Any:
    (case,) = select(cases("tiny"), words)
    return case


def close(result: Any, exact: Tensor, *, within: float = 1e-2) -> bool:
    assert isinstance(result, Tensor) and result.shape == exact.shape, (result.shape, exact.shape)
    return float((result.double() - exact.double()).norm() / exact.double().norm()) < within


def exact(given: Any, *, masked: bool) -> Tensor:
    mask = None
    if masked:
        found, rows = given["block_map"], len(given["q"]) // 128
        mask = torch.stack([torch.cat([row_mask(found, h, r) for r in range(rows)]) for h in range(found.heads)])
    return attend(given["q"], given["k"], given["v"], mask, given["scale"])


# FlashAttention-4 -----------------------------------------------------------------------------------------------------


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None,
    return_lse=False,
):  # fmt: skip
    assert not causal and q.dim() == 4 and q.shape[2] % k.shape[2] == 0 and q.dtype == k.dtype == v.dtype == BF16
    return attend(q[0], k[0], v[0], None, softmax_scale).to(BF16)[None], None


def test_flash_attention_4(install):
    install("flash_attn.cute", flash_attn_func=flash_attn_func)
    case = case_of("sparse_attention-dense/tiny/fp8")
    inputs = bf16_inputs(case, CPU)
    peer = peer_of("FlashAttention-4")
    assert peer.fits(case) and not peer.fits(case_of("window/tiny/fp8"))
    result, _ = peer.prepare(case, inputs)()
    assert close(result[0], exact(inputs, masked=False))


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
    peer = peer_of("cuDNN fp8")
    assert peer.available(torch.device("cuda")) == "nvidia-cudnn-frontend is not installed"
    install(
        "cudnn", data_type=kind, heur_mode=mode, pygraph=CudnnGraph, create_handle=object,
        set_stream=lambda handle, stream: None,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    case = case_of("sparse_attention-dense/tiny/fp8")
    inputs = bf16_inputs(case, CPU)
    assert peer.fits(case) and not peer.fits(case_of("sparse_attention-dense/tiny/bf16"))
    result = peer.prepare(case, inputs)()[0].transpose(0, 1)
    assert close(result, exact(inputs, masked=False), within=0.2)


# sageattention --------------------------------------------------------------------------------------------------------


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not is_causal and not return_lse and not kwargs
    k -= k.mean(dim=1, keepdim=True)  # version 1 changes its argument
    return attend(q[0], k[0], v[0], None, sm_scale).to(q.dtype)[None]


def test_sageattention_and_that_its_change_of_k_reaches_no_other_peer(install):
    install("sageattention", sageattn=sageattn)
    case = case_of("sparse_attention-dense/tiny/bf16")
    inputs = bf16_inputs(case, CPU)
    before = inputs["k"].clone()
    result = peer_of("sageattention").prepare(case, inputs)()
    assert close(result[0], exact(inputs, masked=False), within=2e-2)
    assert torch.equal(inputs["k"], before)
