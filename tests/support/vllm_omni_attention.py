"""In a process of vLLM-Omni: its own loader, registry, backends and metadata, with this package's plugins."""

import dataclasses
import json
import logging

import torch
import torch.nn.functional as F
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum as Members
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.platforms import current_omni_platform
from vllm_omni.plugins import load_omni_general_plugins

import happyhorse_fast as hh
from happyhorse_fast.hosts import vllm_omni

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm").addHandler(handler)
logging.getLogger("vllm").setLevel(logging.INFO)
load_omni_general_plugins()
found = {"chosen": [member.name for member in Members if member.is_overridden()]}
vllm_omni.CALLS = hh.hosts.Calls("vLLM-Omni", backend="reference")

torch.manual_seed(0)
q, (k, v) = torch.randn(2, 140, 4, 64), torch.randn(2, 2, 160, 4, 64)
mask = torch.ones(2, 160, dtype=torch.bool)
mask[1, 100:] = False


def attend(member, dtype, **metadata):
    """(of the class that the registry gives now, of vLLM-Omni's own)"""
    classes = [member.get_class(), resolve_obj_by_qualname(member.value)]
    how = {"num_heads": 4, "head_size": 64, "softmax_scale": 0.125, "causal": False}
    impls = [each.get_impl_cls()(**how) for each in classes]
    given = [x.to(dtype) for x in (q, k, v)]
    return [impl.forward_cuda(*given, AttentionMetadata(**metadata)) for impl in impls]


def layer(**more):
    """vLLM-Omni's layer of attention, as on a GPU for which it chooses TORCH_SDPA."""
    platform = type(current_omni_platform)
    platform.is_cuda = lambda self: True
    platform.get_diffusion_attn_backend_cls = lambda self, **asked: Members.TORCH_SDPA.get_path()
    return Attention(num_heads=4, head_size=64, softmax_scale=0.125, causal=False, **more)


exact = F.scaled_dot_product_attention(
    *(x.to(torch.bfloat16).double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None]
).transpose(1, 2)
error = lambda x: float((x - exact).norm() / exact.norm())  # noqa: E731
for member in (Members.FLASH_ATTN, Members.TORCH_SDPA, Members.CUDNN_ATTN):
    name = member.name
    vllm_omni.os.environ[vllm_omni.ENVIRONMENT] = name
    vllm_omni.register()
    ours, base = member.get_class(), resolve_obj_by_qualname(member.value)
    found[name] = {
        "is a": issubclass(ours, base) and issubclass(ours.get_impl_cls(), base.get_impl_cls()),
        "name": ours.get_name() == base.get_name(),
        "path": member.get_path(),
    }
    if name == "TORCH_SDPA":  # the others need their libraries for a call of their own
        found["errors"] = [error(x) for x in attend(member, torch.bfloat16, attn_mask=mask)]
        found["float32"] = torch.equal(*attend(member, torch.float32, attn_mask=mask))
        found["layer"] = error(layer()(*(x.bfloat16() for x in (q, k, v)), AttentionMetadata(attn_mask=mask)))
        own_impl = type("OwnImpl", (base.get_impl_cls(),), {})
        found["a model's own"] = type(layer(impl_overrides={base.get_name(): own_impl}).attention) is own_impl
        found["joint query"] = torch.equal(*attend(member, torch.bfloat16, attn_mask=mask, joint_query=q[:, :1]))
found["taken"], found["left"] = vllm_omni.CALLS.taken, dict(vllm_omni.CALLS.left)
vllm_omni.unregister()
logging.getLogger("happyhorse_fast").warning("after it")
found["lines"] = lines
found["after"] = [member.name for member in Members if member.is_overridden()]
found["metadata"] = [field.name for field in dataclasses.fields(AttentionMetadata)]
print(json.dumps(found))
