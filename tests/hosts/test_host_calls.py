"""What a host's attention calls are taken for, and what stays the host's: `hosts.Calls` and `hosts.sdpa`."""

import logging
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import happyhorse_fast as hh
from happyhorse_fast.hosts import Calls, Chosen, sdpa
from happyhorse_fast.hosts import calls as calls_module
from happyhorse_fast.hosts.key_masks import KeyMasks, broadcast
from happyhorse_fast.ops.runtime.dispatch import Choice, op_choice

OWN = F.scaled_dot_product_attention


def drawn(batch=2, heads=(4, 2), n=150, m=150, d=32, dtype=torch.bfloat16):
    shapes = ((batch, heads[0], n, d), (batch, heads[1], m, d), (batch, heads[1], m, d))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def near(out, q, k, v, mask=None, factor=1.5):
    """At most 1.5 times as far from float64 as PyTorch's bf16."""
    exact = OWN(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    error = (out.double() - exact).norm()
    return error <= factor * (OWN(q, k, v, attn_mask=mask, enable_gqa=True).double() - exact).norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_call_that_fits_is_taken(backend):
    q, k, v = drawn()
    with sdpa(backend=backend) as calls:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        scaled = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.5, enable_gqa=True)
    assert calls.taken == 2 and not calls.left
    assert out.dtype == torch.bfloat16 and near(out, q, k, v)
    assert torch.equal(scaled, hh.attention(q, k, v, scale=0.5, backend=backend))
    assert str(calls) == "PyTorch: 2 attention calls by happyhorse_fast"


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "query is float32, not bfloat16"),
        ({"d": 48}, {}, "head dim 48, not 32, 64, 128"),
        ({}, {"is_causal": True}, "is_causal"),
        ({}, {"dropout_p": 0.1}, "dropout"),
        ({}, {"scale": -1.0}, "scale is not positive and finite"),
        ({}, {"attn_mask": torch.zeros(150, 150).bfloat16()}, "attn_mask is bfloat16: only bool masks are read"),
        (
            {},
            {"attn_mask": torch.ones(150, 150, dtype=torch.bool)},
            "attn_mask differs by query or head: only masks of keys are read, [B or 1, 1, 1, M]",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_the_hosts(change, options, reason, caplog):
    q, k, v = drawn(heads=(2, 2), **change)
    torch.manual_seed(1)
    wanted = OWN(q, k, v, **options)
    with caplog.at_level(logging.INFO, logger="happyhorse_fast"), sdpa(backend="reference") as calls:
        for _ in range(2):
            torch.manual_seed(1)
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, **options), wanted)
    assert calls.taken == 0 and dict(calls.left) == {reason: 2}
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("happyhorse_fast.hosts.calls", "WARNING", f"PyTorch runs attention itself: {reason}")
    ]
    assert str(calls).endswith(f"; 2 by PyTorch itself: {reason}")
    with pytest.raises(ValueError, match="strict: PyTorch would run attention itself"):  # noqa: SIM117
        with sdpa(backend="reference", strict=True):
            F.scaled_dot_product_attention(q, k, v, **options)
    assert F.scaled_dot_product_attention is OWN


def test_gradients_heads_and_dimensions_stay_the_hosts():
    q, k, v = drawn(batch=1)
    with sdpa(backend="reference") as calls:
        F.scaled_dot_product_attention(q.requires_grad_(), k, v, enable_gqa=True)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q.detach(), k, v)
        F.scaled_dot_product_attention(q[0, :2].detach(), k[0], v[0])
        F.scaled_dot_product_attention(q.detach(), k, v, scale=math.inf, enable_gqa=True)
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert calls.taken == 1
    assert set(calls.left) == {
        "query requires gradients",
        "4 heads of queries on 2 of keys without enable_gqa",
        "query has 3 dimensions, not 4",
        "scale is not positive and finite",
    }


def test_tangents_stay_the_hosts():
    q, k, v = drawn(heads=(2, 2))
    with sdpa(backend="reference") as calls, sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, k, v), (q,), (q,))
    assert tangent.any() and calls.taken == 0


def test_on_a_cpu_auto_leaves_every_call_and_says_why():
    q, k, v = drawn(heads=(2, 2))
    with sdpa() as calls:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), OWN(q, k, v))
    assert calls.taken == 0 and "interpreter" in next(iter(calls.left))


def test_the_patch_is_of_one_block_and_one_thread():
    q, k, v = drawn(heads=(2, 2), n=20, m=20)
    with sdpa(backend="reference") as calls:
        assert F.scaled_dot_product_attention is not OWN
        other = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, k, v))
        other.start()
        other.join()
        with pytest.raises(RuntimeError, match="is open already"), sdpa():
            pass
        assert F.scaled_dot_product_attention is not OWN
    assert F.scaled_dot_product_attention is OWN and calls.taken == 0 and not calls.left
    with pytest.raises(KeyError), sdpa(backend="reference"):
        raise KeyError
    assert F.scaled_dot_product_attention is OWN


@pytest.mark.parametrize("layout", ["[B, M]", "[B, 1, 1, M]", "[1, 1, 1, M]"])
def test_a_mask_of_keys_is_a_block_map(layout):
    q, k, v = drawn(m=200)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    mask[0, ..., 130:] = False
    mask[1, ..., 5:7] = False
    mask = {"[B, M]": mask[:, 0, 0], "[1, 1, 1, M]": mask[:1]}.get(layout, mask)
    mask = broadcast(mask, 2, 200, by_item=True)
    calls = Calls("test", backend="reference")
    out = calls(q, k, v, own=lambda: pytest.fail("the host's"), mask=mask)
    assert near(out, q, k, v, mask)
    assert not near(out, q, k, v), "the mask was not seen"
    assert out.shape == q.shape and calls.taken == 1


def test_a_mask_of_two_dimensions_is_pytorchs_and_not_of_items():
    q, k, v = drawn(batch=2, heads=(2, 2), n=2, m=150)
    mask = torch.rand(2, 150) < 0.5  # [N, M], and B is N
    with sdpa(backend="reference") as calls:
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), OWN(q, k, v, attn_mask=mask))
        assert calls.taken == 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:1])
    assert calls.taken == 1 and near(out, q, k, v, mask[:1])


def test_a_mask_is_read_once_until_it_changes(monkeypatch):
    from happyhorse_fast.hosts import key_masks

    read = []
    monkeypatch.setattr(key_masks, "_read", lambda mask, queries: read.append(queries) or [None])
    masks, mask = key_masks.KeyMasks(), torch.ones(2, 1, 1, 200, dtype=torch.bool)
    for _ in range(2):
        masks.maps(mask, 150)
        masks.maps(mask[:, :1], 150)
    assert read == [150]
    masks.maps(mask, 151)
    mask[0, 0, 0, 3] = False
    masks.maps(mask, 151)
    masks.maps(mask.clone(), 151)
    assert read == [150, 151, 151, 151]
    with torch.inference_mode():
        uncounted = mask.clone()
    masks.maps(uncounted, 150)
    masks.maps(uncounted, 150)
    assert len(read) == 6
    for _ in range(20):
        masks.maps(torch.ones(1, 1, 1, 9, dtype=torch.bool), 150)
    assert len(masks._known) <= key_masks.REMEMBERED


def test_masks_of_one_content_share_their_maps():
    mask = torch.rand(2, 1, 1, 200) < 0.5
    first, again, other = (KeyMasks().maps(each, 150) for each in (mask, mask.clone(), ~mask))
    assert len(first) == 2 and all(x is y for x, y in zip(first, again, strict=True))
    assert not any(x is y for x, y in zip(first, other, strict=True))
    for item, block_map in zip(mask[:, 0], first, strict=True):
        assert torch.equal(block_map.to_dense()[0], item.expand(150, 200))


def test_a_window_is_for_calls_of_its_size():
    q, k, v = drawn(heads=(2, 2), n=300, m=300)
    window = hh.BlockMap.from_ranges([(0, 150), (150, 300)], [(0, 120), (80, 200)], queries=300, keys=300)
    calls = Calls("test", backend="reference", sparsity=window)
    own = lambda: pytest.fail("the host's")  # noqa: E731
    assert torch.equal(calls(q, k, v, own), hh.attention(q, k, v, block_map=window))
    q = q[:, :, :299]
    assert torch.equal(calls(q, k, v, own), hh.attention(q, k, v))


@pytest.mark.parametrize("policy", [hh.TopK(0.25), hh.TopP(0.3)])
def test_chosen_blocks_are_those_of_the_selector(policy):
    q, k, v = drawn(heads=(2, 1), n=1000, m=1000)
    k[0, 0, 256:384] *= 4
    chosen = Chosen(policy, tokens=1000, video=(100, 1000))
    calls = Calls("test", backend="reference", sparsity=chosen)
    out = calls(q, k, v, own=lambda: pytest.fail("the host's"))
    maps = [chosen.map(x.transpose(0, 1), y.transpose(0, 1), "reference") for x, y in zip(q, k, strict=True)]
    dense = torch.stack([each.to_dense() for each in maps])
    assert dense[:, :, 128:, :128].all() and dense[:, :, :128].all(), "what holds other tokens is dense"
    assert dense.float().mean() < 0.6
    assert near(out, q, k, v, dense)
    with pytest.raises(ValueError, match="video must be a span of the 1000 tokens"):
        Chosen(policy, tokens=1000, video=(100, 1001))


def test_what_is_no_sparsity_is_refused():
    with pytest.raises(TypeError, match="sparsity must be a BlockMap"):
        Calls("test", sparsity=hh.TopK(0.5))
    with pytest.raises(TypeError, match="policy must be TopK or TopP, got Tiles"):
        Chosen(hh.Tiles(1, 1, 1), tokens=1000)
    with pytest.raises(ValueError, match="backend must be"):
        Calls("test", backend="cudnn")


def test_a_compiled_graph_takes_the_call():
    q, k, v = drawn(heads=(2, 2))
    calls = Calls("test", backend="reference")
    run = torch.compile(lambda *x: calls(*x, lambda: OWN(*x)) + 1, backend="eager", fullgraph=True)
    assert torch.equal(run(q, k, v), hh.attention(q, k, v) + 1)
    masked = torch.compile(
        lambda *x: calls(*x, lambda: OWN(*x), mask=torch.ones(2, 1, 1, 150, dtype=torch.bool)),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(masked(q, k, v), OWN(q, k, v))


def test_auto_takes_the_kernel_that_passed_and_asks_once(monkeypatch):
    asked, backends = [], {"block_sparse_attention": "triton", "select_blocks": "triton"}

    def choice(op, device):
        asked.append((op, device.type))
        return Choice(op, backends[op], f"why {op} runs so")

    monkeypatch.setattr(calls_module, "op_choice", choice)
    q, k, v = drawn(heads=(2, 2), n=20, m=20)
    own = lambda: OWN(q, k, v)  # noqa: E731
    calls = Calls("test")
    compiled = torch.compile(lambda *x: calls(*x, own), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), own()) and not asked, "a self-check does not fit in a graph"
    assert torch.equal(calls(q, k, v, own), hh.attention(q, k, v, backend="triton"))
    assert torch.equal(calls(q, k, v, own), hh.attention(q, k, v, backend="triton"))
    assert asked == [("block_sparse_attention", "cpu")] and calls.taken == 2
    asked.clear()
    backends["select_blocks"] = "reference"
    calls = Calls("test", sparsity=Chosen(hh.TopK(0.5), tokens=20))
    assert torch.equal(calls(q, k, v, own), own())
    assert len(asked) == 2 and dict(calls.left) == {"why select_blocks runs so": 1}


def test_the_cuda_kernel_gets_what_it_can_read():
    calls = Calls("test", backend="cuda")
    q, k, v = drawn(heads=(2, 2), n=20, m=20)
    own = lambda: OWN(q, k, v)  # noqa: E731
    assert torch.equal(calls(q, k, v, own), hh.attention(q, k, v, backend="cuda"))
    apart = k.transpose(2, 3).contiguous().transpose(2, 3)
    odd = torch.cat([k.new_zeros(1), k.flatten()])[1:].view(k.shape)
    for off in (apart, odd):
        assert torch.equal(off, k) and torch.equal(calls(q, off, v, own), own())
    assert calls.taken == 1 and list(calls.left.values()) == [2]


def test_the_choice_of_one_op_says_why():
    found = op_choice("block_sparse_attention", torch.device("cpu"))
    assert (found.op, found.backend, found.fell_back) == ("block_sparse_attention", "reference", True)
    assert "interpreter" in found.reason
