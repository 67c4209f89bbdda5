"""A whole step on the GPU: in a CUDA graph, compiled, with weights that waited on the host, in a host, by two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from gpu_support import DEVICE, DRY, MARKS, RECORDED, captured, synchronize
from rank_pool import rank_pool
from rank_work import alone_and_together, config_of

import happyhorse_fast as hh
from happyhorse_fast import golden
from happyhorse_fast.budgets import measure
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig, TopK
from happyhorse_fast.pipeline.host_weights import HostWeights

pytestmark = MARKS
# Of test_gpu_model.py, whose kernels are compiled ahead.
CASE = golden.load_case("postnorm_v2_fp32" if DRY else "local_d128_fp32")
BACKEND: Any = "reference" if DRY else "triton"
FORMS: list[dict[str, Any]] = [{}, {"precision": "fp8"}, {"precision": "fp8", "attention": "fp8"}]


def inputs() -> list[torch.Tensor]:
    return [CASE.tensors[f"in.{name}"].to(DEVICE, copy=True) for name in ("video", "audio", "text")]


def model(**how: Any) -> torch.nn.Module:
    return accelerate(CASE.model(torch.bfloat16).to(DEVICE), FastConfig(backend=BACKEND, **how))


@pytest.mark.parametrize("how", [*FORMS, {"sparsity": TopK(0.5)}], ids=str)
@torch.no_grad()
def test_a_step_in_a_graph_follows_its_inputs(how: dict[str, Any]) -> None:
    step, given = model(**how), inputs()
    replay, results = captured(lambda: step(*given))
    given[0].mul_(0.5).add_(0.1)
    expected = [x.clone() for x in step(*given)]
    replay()
    synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("how", FORMS, ids=str)
@torch.no_grad()
def test_weights_wait_in_pinned_memory_and_come_back_as_they_were(how: dict[str, Any]) -> None:
    step, given = model(**how), inputs()
    expected = [x.clone() for x in step(*given)]
    held = sum(x.nbytes for x in (*step.parameters(), *step.buffers()))
    host = HostWeights(step, pinned=DEVICE.type == "cuda")
    assert DEVICE.type == "cpu" or all(block.is_pinned() for block in host._blocks)
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else held
    host.leave()
    assert all(x.is_meta for x in (*step.parameters(), *step.buffers()))
    assert DEVICE.type == "cpu" or before - torch.cuda.memory_allocated() >= held
    host.come(given[0].device)
    assert all(torch.equal(a, b) for a, b in zip(step(*given), expected, strict=True))


@pytest.mark.skipif(RECORDED, reason="nothing is launched that its kernels could be compared with")
@pytest.mark.parametrize("tokens_first", [True, False], ids=["dense rows", "rows apart"])
@torch.no_grad()
def test_attention_of_pytorch_runs_here_in_a_block(tokens_first: bool) -> None:
    def draw(seed: int, heads: int) -> torch.Tensor:
        x = torch.randn(2, 300, heads, 64, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)
        return x.transpose(1, 2) if tokens_first else x.transpose(1, 2).contiguous()

    q, k, v = draw(0, 4), draw(1, 2), draw(2, 2)
    mask = (torch.arange(300, device=DEVICE) < 200)[None, None, None]
    with hh.hosts.sdpa(backend="reference" if DRY else "auto", strict=True) as calls:
        call = lambda: (functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),)  # noqa: E731
        (out,) = call()
        masked = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        replay, (recorded,) = captured(call)
    replay()
    synchronize()
    assert calls.taken >= 3 and not calls.left
    for found, hidden in ((out, None), (masked, mask), (recorded, None)):
        exact = functional.scaled_dot_product_attention(
            *(x.double() for x in (q, k, v)), attn_mask=hidden, enable_gqa=True
        )
        assert measure(found.cpu(), exact.cpu()).relative_l2 < 5e-3


@pytest.mark.skipif(RECORDED, reason="processes of their own record nothing")
@pytest.mark.parametrize("how", [{}, {"precision": "fp8"}], ids=str)
def test_two_processes_share_a_clip_on_one_gpu(how: dict[str, Any]) -> None:
    # Over gloo, as NCCL refuses two ranks on a GPU: all but NCCL itself is as on two.
    fast = FastConfig(backend=BACKEND, **how)
    with rank_pool(2) as pool:
        results = pool(alone_and_together, 2, config_of(2, head_dim=32), fast, (4, 64, 13), device=DEVICE.type)
    assert not (errors := [result for result in results if isinstance(result, Exception)]), errors
    for _, together, again in results:
        for wanted, there, repeated in zip(results[0][0], together, again, strict=True):
            assert np.array_equal(there, wanted) and np.array_equal(repeated, wanted)


@pytest.mark.skipif(RECORDED, reason="Inductor's kernels are its own")
@torch.no_grad()
def test_a_compiled_step_is_what_an_eager_one_is() -> None:
    step, given = model(precision="fp8"), inputs()
    expected = [x.clone() for x in step(*given)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if DRY else "inductor")
    for found, wanted in zip(compiled(*given), expected, strict=True):
        # The ends are float32, in another order; a bf16 step between is 4e-3.
        assert measure(found.cpu(), wanted.double().cpu()).relative_l2 < 4e-3
    torch._dynamo.reset()
