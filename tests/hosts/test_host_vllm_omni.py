"""The plugin of `hosts.vllm_omni` in a stand-in of vLLM-Omni's registry, backends and layers."""

import enum
import importlib
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import pytest
import torch
import torch.nn.functional as F

import happyhorse_fast as hh
from happyhorse_fast.hosts import versions, vllm_omni


class AttentionImpl(ABC):
    @abstractmethod
    def forward_cuda(self, query, key, value, attn_metadata=None): ...


class FlashAttentionImpl(AttentionImpl):
    def __init__(self, softmax_scale, causal=False):
        self.softmax_scale, self.causal = softmax_scale, causal

    def forward_cuda(self, query, key, value, attn_metadata=None):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        how = {"is_causal": self.causal, "scale": self.softmax_scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2)


class FlashAttentionBackend:
    supports_paged_kv = True

    @staticmethod
    def get_name():
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls():
        return FlashAttentionImpl


class OwnImpl(FlashAttentionImpl):
    """A model's own implementation, which a layer holds against its backend's class."""


@dataclass
class Metadata:
    attn_mask: torch.Tensor | None = None
    joint_query: torch.Tensor | None = None
    full_attn_spans: list | None = None
    packed_padding: object | None = None
    extra: dict = field(default_factory=dict)


@pytest.fixture
def host(monkeypatch):
    """Modules under vLLM-Omni's names, with a registry as it has one."""
    overrides, models = {}, []

    class Named(enum.EnumMeta):
        def __getitem__(cls, name):
            if name not in cls.__members__:
                raise ValueError(f"Unknown diffusion attention backend: {name!r}")
            return super().__getitem__(name)

    class Members(enum.Enum, metaclass=Named):
        FLASH_ATTN = "vllm_omni.diffusion.attention.backends.flash_attn.FlashAttentionBackend"
        TORCH_SDPA = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

        def get_path(self):
            return overrides.get(self, self.value)

        def get_class(self):
            module, _, name = self.get_path().rpartition(".")
            return getattr(importlib.import_module(module), name)

        def is_overridden(self):
            return self in overrides

        def clear_override(self):
            overrides.pop(self, None)

    def module(name, **names):
        made = types.ModuleType(f"vllm_omni{name}")
        made.__path__ = []
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, made.__name__, made)

    module("", __version__=versions.TESTED["vllm-omni"])
    module(".diffusion")
    module(".diffusion.registry", register_diffusion_model=lambda *names: models.append(names))
    module(".diffusion.model_metadata", DiffusionModelMetadata=dict, _DIFFUSION_MODEL_METADATA={})
    module(".diffusion.attention")
    module(".diffusion.attention.backends")
    module(
        ".diffusion.attention.backends.registry",
        DiffusionAttentionBackendEnum=Members,
        register_diffusion_backend=overrides.__setitem__,
    )
    module(".diffusion.attention.backends.flash_attn", FlashAttentionBackend=FlashAttentionBackend)
    monkeypatch.setattr(vllm_omni, "CALLS", hh.hosts.Calls("vLLM-Omni", backend="reference"))
    vllm_omni._backend.cache_clear()
    Members.models = models
    yield Members
    vllm_omni._backend.cache_clear()


def load_plugins(monkeypatch):
    """As vLLM-Omni loads them, in every process."""
    ours = [p for p in entry_points(group="vllm_omni.general_plugins") if p.value.startswith("happyhorse_fast.")]
    assert len(ours) == 1, "installed without its entry point"
    ours[0].load()()


def drawn(dtype=torch.bfloat16):
    """[B, N, Hq, D], [B, M, Hkv, D] twice."""
    return [torch.randn(2, n, h, 64).to(dtype) for n, h in ((140, 4), (160, 2), (160, 2))]


def test_installing_is_enabling_and_the_call_is_taken(host, monkeypatch):
    load_plugins(monkeypatch)
    load_plugins(monkeypatch)  # processes load plugins more than once
    backend = host.FLASH_ATTN.get_class()
    assert (
        backend.get_name() == "FLASH_ATTN" and backend.supports_paged_kv and issubclass(backend, FlashAttentionBackend)
    )
    impl = backend.get_impl_cls()
    assert issubclass(impl, FlashAttentionImpl) and issubclass(OwnImpl, impl) and not issubclass(dict, impl)
    q, k, v = drawn()
    out = impl(softmax_scale=0.2).forward_cuda(q, k, v)
    assert torch.equal(out, hh.attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.2).transpose(1, 2))
    mask = torch.ones(2, 160, dtype=torch.bool)
    mask[1, 100:] = False
    out = impl(softmax_scale=0.2).forward_cuda(q, k, v, Metadata(attn_mask=mask, extra={"novel": 1}))
    short = hh.attention(*(x[1:].transpose(1, 2) for x in (q, k[:, :100], v[:, :100])), scale=0.2).transpose(1, 2)
    torch.testing.assert_close(out[1:], short, atol=2e-2, rtol=2e-2)
    assert vllm_omni.CALLS.taken == 2 and host.TORCH_SDPA.get_path() == host.TORCH_SDPA.value
    vllm_omni.unregister()
    assert host.FLASH_ATTN.get_class() is FlashAttentionBackend


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (Metadata(full_attn_spans=[[(0, 3)]]), "metadata with full_attn_spans"),
        (Metadata(packed_padding=object()), "metadata with packed_padding"),
        (Metadata(joint_query=torch.zeros(1)), "metadata with joint_query"),
        (Metadata(extra={"max_seqlen_q": 3}), "metadata with max_seqlen_q"),
        (Metadata(extra={"valid_kv_length": 3}), "metadata with valid_kv_length"),
        (Metadata(extra={"kv_cache_dtype": "fp8"}), "keys and values in fp8"),
        ("float16", "query is float16, not bfloat16"),
        ("causal", "is_causal"),
    ],
)
def test_what_does_not_fit_runs_as_before(metadata, reason, host, monkeypatch):
    load_plugins(monkeypatch)
    qkv = drawn(torch.float16 if metadata == "float16" else torch.bfloat16)
    how = {"softmax_scale": 0.2, "causal": metadata == "causal"}
    given = metadata if isinstance(metadata, Metadata) else None
    out = host.FLASH_ATTN.get_class().get_impl_cls()(**how).forward_cuda(*qkv, given)
    assert torch.equal(out, FlashAttentionImpl(**how).forward_cuda(*qkv))
    assert dict(vllm_omni.CALLS.left) == {reason: 1} and vllm_omni.CALLS.taken == 0


def test_another_interface_registers_nothing_and_one_line_says_so(host, monkeypatch, caplog):
    monkeypatch.delattr(sys.modules["vllm_omni.diffusion.attention.backends.registry"], "register_diffusion_backend")
    load_plugins(monkeypatch)
    assert not any(member.is_overridden() for member in host)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(
        "vLLM-Omni runs without happyhorse_fast: vllm-omni 0.30.0 does not have vllm_omni.diffusion."
    )


def test_off_another_member_and_another_plugin(host, monkeypatch, caplog):
    monkeypatch.setenv(vllm_omni.ENVIRONMENT, "off")
    load_plugins(monkeypatch)
    assert not any(member.is_overridden() for member in host) and not host.models
    monkeypatch.setenv(vllm_omni.ENVIRONMENT, "NO_SUCH")
    with pytest.raises(ValueError, match="Unknown diffusion attention backend: 'NO_SUCH'"):  # vLLM-Omni's own
        load_plugins(monkeypatch)
    monkeypatch.setenv(vllm_omni.ENVIRONMENT, "TORCH_SDPA")
    load_plugins(monkeypatch)
    assert host.TORCH_SDPA.get_path() == "happyhorse_fast.hosts.vllm_omni.Backend_TORCH_SDPA"
    monkeypatch.delenv(vllm_omni.ENVIRONMENT)
    sys.modules["vllm_omni.diffusion.attention.backends.registry"].register_diffusion_backend(
        host.FLASH_ATTN, "other.B"
    )
    load_plugins(monkeypatch)
    vllm_omni.unregister()
    assert host.FLASH_ATTN.get_path() == "other.B" and host.TORCH_SDPA.get_path() == host.TORCH_SDPA.value
    assert caplog.messages == ["vLLM-Omni runs attention itself: FLASH_ATTN is other.B already"]


def test_the_sparse_plugin_keeps_what_the_selector_chooses(host):
    (plugin,) = entry_points(group="vllm_omni.sparse_attn", name="happyhorse_fast")
    attend = plugin.load()
    assert not any(attend.capabilities.values())
    q, k, v = (torch.randn(2, 600, h, 64).bfloat16() for h in (4, 2, 2))
    how = {"is_causal": False, "softmax_scale": 0.2}
    for params, policy in (({"novel": 1}, hh.TopK(0.25)), ({"keep": 0.5}, hh.TopK(0.5)), ({"mass": 0.3}, hh.TopP(0.3))):
        out = attend(q, k, v, params, **how)
        chosen = hh.hosts.Chosen(policy, tokens=600)
        for item, *one in zip(out, q, k, v, strict=True):
            block_map = chosen.map(one[0], one[1], "reference")
            assert block_map.density() < 1
            assert torch.equal(item, hh.attention(*one, block_map=block_map, scale=0.2))
    exact = attend(q[:, :100], k, v, {}, **how)
    assert torch.equal(exact[0], hh.attention(q[0, :100], k[0], v[0], scale=0.2)), "cross-attention is exact"
    with pytest.raises(ValueError, match="strict: vLLM-Omni would run attention itself: is_causal"):
        attend(q, k, v, {}, is_causal=True, softmax_scale=0.2)
    with pytest.raises(ValueError, match="params must have keep or mass"):
        attend(q, k, v, {"keep": 0.5, "mass": 0.5}, **how)
