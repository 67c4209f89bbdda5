"""What calls peers from other projects. Each is imported when it is first prepared, never before."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case
from bench.inputs import Given
from bench.measure.timing import Call


def flash_attention_4(case: Case, given: Given) -> Call:
    """FlashAttention-4 in bf16, written in CuTe DSL, its kernels for Hopper included: q, k, v [B, N, H, D]."""
    from flash_attn.cute import flash_attn_func

    q, k, v = (given[name][None] for name in "qkv")
    return lambda: flash_attn_func(q, k, v, softmax_scale=given["scale"], causal=False)


def cudnn_fp8(case: Case, given: Given) -> Call:
    """cuDNN's attention on e4m3 codes with a scale per tensor, e4m3 out: q, k, v [B, H, N, D], any strides.

    torch has no call of it; nvidia-cudnn-frontend does, and is no part of a torch installation.
    """
    import cudnn

    e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(given["q"].device).cuda_stream)
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=float32, compute_data_type=float32, handle=handle)
    codes = [given[name].to(torch.float8_e4m3fn).transpose(0, 1)[None] for name in "qkv"]
    one = torch.ones(1, 1, 1, 1, device=given["q"].device)
    scalar = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": float32}
    tensors = [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=e4m3) for x in codes]
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    scales = {name: graph.tensor(**scalar) for name in names}
    out, _, *largest = graph.sdpa_fp8(
        **dict(zip("qkv", tensors, strict=True)),
        **scales,
        generate_stats=False,
        attn_scale=float(given["scale"]),
        use_causal_mask=False,
    )
    result = torch.empty_like(codes[0])
    out.set_output(True).set_dim(list(result.shape)).set_stride(list(result.stride())).set_data_type(e4m3)
    found = [torch.empty_like(one) for _ in largest]
    for amax in largest:
        amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(float32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=given["q"].device)
    pack = dict(zip([*tensors, out, *largest], [*codes, result, *found], strict=True))
    pack |= dict.fromkeys(scales.values(), one)

    def run() -> Tensor:
        graph.execute(pack, workspace, handle=handle)
        return result

    return run


def sageattention(case: Case, given: Given) -> Call:
    """sageattention's own choice of int8 and fp8 kernels, which quantise in the call: q, k, v [B, N, H, D]."""
    from sageattention import sageattn

    # Version 1 subtracts the mean of k in place.
    q, k, v = (given[name][None].clone() for name in "qkv")
    return lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=given["scale"])
