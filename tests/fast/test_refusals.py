"""What a model must not carry when it is accelerated, or get afterwards: each is named, and nothing is changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import public_model
import pytest
import torch
from public_model import BaseLinear, DiTModel
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune

from happyhorse_fast import golden
from happyhorse_fast.eager.model import HappyHorse, Layer, Weight
from happyhorse_fast.fast.accelerate import accelerate, restore
from happyhorse_fast.fast.config import FastConfig, Tiles
from happyhorse_fast.fast.state import is_accelerated

FAST = FastConfig(backend="reference")
CASE = golden.load_case("local_v1_fp32")


def happyhorse() -> HappyHorse:
    return CASE.model(torch.bfloat16)


def public() -> Any:
    return DiTModel(happyhorse())


def run(model: nn.Module) -> list[torch.Tensor]:
    t = CASE.tensors
    with torch.no_grad():
        if isinstance(model, HappyHorse):
            return list(model(t["in.video"], t["in.audio"], t["in.text"]))
        handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
        return [model(t["tokens"], t["coords"], t["modality"], None, handler)]


def hook(*_: Any) -> None:
    """Does nothing; its name is to be in messages."""


class OwnForward(HappyHorse):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnHead(HappyHorse):
    def _head(self, *args: Any) -> torch.Tensor:
        return super()._head(*args) * 2


class OwnLayer(Layer):
    def forward(self, *args: Any) -> torch.Tensor:
        return super().forward(*args) * 2


class OwnPublic(DiTModel):
    def forward(self, *args: Any) -> torch.Tensor:
        return super().forward(*args) * 2


class OwnLinear(BaseLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LoraLayer(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2)})


class Quantised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def become(kind: type) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.__class__ = kind

    return change


def layer(model: Any) -> Any:
    return model.block.layers[1]


def wrap_qkv(model: Any) -> None:
    layer(model).attention.linear_qkv = LoraLayer(layer(model).attention.linear_qkv)


def replace_embedder(model: Any) -> None:
    old = model.adapter.video_embedder
    model.adapter.video_embedder = Quantised(old.in_features, old.out_features)


def integers(model: Any) -> None:
    weight = layer(model).mlp.down_proj.weight
    layer(model).mlp.down_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def parametrised(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer(model).attention.linear_qkv, "weight", nn.Identity())


CARRIED: list[tuple[str, Callable[[Any], object], tuple[str, ...]]] = [
    ("forward hook", lambda m: layer(m).register_forward_hook(hook), ("block.layers.1: forward hook (hook)",)),
    ("on a product", lambda m: layer(m).mlp.down_proj.register_forward_hook(hook), ("mlp.down_proj: forward hook",)),
    ("on an end", lambda m: m.final_linear_audio.register_forward_hook(hook), ("final_linear_audio: forward hook",)),
    ("on the stack", lambda m: m.block.register_forward_hook(hook), ("block: forward hook",)),
    (
        "pre-hook",
        lambda m: layer(m).attention.register_forward_pre_hook(hook, with_kwargs=True),
        ("block.layers.1.attention: forward pre-hook (hook)",),
    ),
    ("backward", lambda m: layer(m).register_full_backward_hook(hook), ("block.layers.1: backward hook",)),
    ("of the model", lambda m: m.register_full_backward_hook(hook), ("model: backward hook",)),
    ("pre", lambda m: layer(m).register_full_backward_pre_hook(hook), ("block.layers.1: backward pre-hook",)),
    ("state", lambda m: layer(m).register_state_dict_post_hook(hook), ("block.layers.1: state-dict hook",)),
    ("instance", lambda m: setattr(layer(m), "forward", hook), ("block.layers.1: forward is replaced", "(hook)")),
    ("model's", lambda m: setattr(m, "forward", m.forward), ("model: forward is replaced on the instance",)),
    ("parametrised", parametrised, ("linear_qkv: parametrised (weight)",)),
    (
        "weight_norm",
        lambda m: parametrizations.weight_norm(layer(m).mlp.up_gate_proj),
        ("mlp.up_gate_proj: parametrised (weight)",),
    ),
    (
        "old weight_norm",
        lambda m: nn.utils.weight_norm(m.final_linear_video),
        ("final_linear_video: forward pre-hook (WeightNorm)",),
    ),
    (
        "spectral_norm",
        lambda m: nn.utils.spectral_norm(layer(m).attention.linear_proj),
        ("linear_proj: forward pre-hook (SpectralNorm)",),
    ),
    (
        "prune",
        lambda m: prune.l1_unstructured(layer(m).attention.linear_proj, "weight", 3),
        ("linear_proj: forward pre-hook (L1Unstructured)",),
    ),
    ("peft", wrap_qkv, ("linear_qkv: added or replaced, is a LoraLayer", "base_layer, lora_A")),
    ("quantised", replace_embedder, ("adapter.video_embedder: replaced, is a test_refusals.Quantised",)),
    ("module", lambda m: setattr(layer(m).mlp, "lora", nn.Linear(2, 2)), ("block.layers.1.mlp: added", "holds lora")),
    (
        "parameter",
        lambda m: layer(m).register_parameter("scale", nn.Parameter(torch.ones(1))),
        ("block.layers.1: added parameters or buffers scale",),
    ),
    ("buffer", lambda m: m.register_buffer("mean", torch.ones(1)), ("model: added parameters or buffers mean",)),
    ("bias", lambda m: setattr(layer(m).mlp.down_proj, "bias", nn.Parameter(torch.ones(1))), ("buffers bias",)),
    ("integers", integers, ("block.layers.1.mlp.down_proj.weight is torch.int8", "quantises by itself")),
]


@pytest.mark.quick(24)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("make", [happyhorse, public])
@pytest.mark.parametrize(("change", "named"), [case[1:] for case in CARRIED], ids=[case[0] for case in CARRIED])
def test_what_packed_layers_would_leave_out_is_named(
    make: Callable[[], Any], change: Callable[[Any], object], named: tuple[str, ...]
) -> None:
    model = make()
    change(model)
    layers = list(model.block.layers)
    with pytest.raises(ValueError, match="model must") as caught:
        accelerate(model, FAST)
    assert [name for name in named if name not in str(caught.value)] == [], str(caught.value)
    assert not is_accelerated(model)
    assert all(a is b for a, b in zip(layers, model.block.layers, strict=True))


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (happyhorse, become(OwnForward), "model: a subclass's own forward (OwnForward)"),
        (happyhorse, become(OwnHead), "model: a subclass's own _head (OwnHead)"),
        (happyhorse, lambda m: become(OwnLayer)(layer(m)), "block.layers.1: a subclass's own forward (OwnLayer)"),
        (happyhorse, lambda m: become(public_model.MLP)(layer(m).mlp), "is a MLP in the place of MLP"),
        (happyhorse, lambda m: setattr(layer(m).mlp.down_proj, "of", hook), "down_proj: of is replaced"),
        (happyhorse, lambda m: setattr(layer(m), "mlp", None), "block.layers.1.mlp.up_gate_proj.weight: is missing"),
        (happyhorse, lambda m: delattr(layer(m).mlp, "down_proj"), "mlp.down_proj.weight: is missing"),
        (happyhorse, lambda m: setattr(layer(m).mlp.down_proj, "weight", None), "down_proj.weight: is missing"),
        (happyhorse, lambda m: m.block.layers.pop(-1), "block.layers.5.attention.pre_norm.weight: is missing"),
        (happyhorse, lambda m: setattr(m, "config", m.config.replace(gelu7_layers=())), "down_proj.weight: is ["),
        (public, become(OwnPublic), "model: a subclass's own forward (OwnPublic)"),
        (public, lambda m: become(OwnLinear)(layer(m).mlp.down_proj), "mlp.down_proj: a subclass's own forward"),
        (public, lambda m: become(Weight)(layer(m).mlp.pre_norm), "block.layers.1.mlp.pre_norm: replaced, is a Weight"),
        (public, lambda m: setattr(layer(m).mlp.pre_norm, "forward", hook), "mlp.pre_norm: forward is replaced"),
        (
            public,
            lambda m: setattr(layer(m).attention.config, "enable_attn_gating", False),
            "block.layers.1.attention: attention gating is off (enable_attn_gating=False)",
        ),
    ],
)
def test_an_own_forward_is_named(make: Callable[[], Any], change: Callable[[Any], object], named: str) -> None:
    model = make()
    change(model)
    with pytest.raises(ValueError, match="model must not carry") as caught:
        accelerate(model, FAST)
    assert named in str(caught.value), str(caught.value)


def test_a_weight_shared_with_an_end_is_named() -> None:
    model = happyhorse()
    model.final_norm_video.weight = layer(model).mlp.pre_norm.weight
    with pytest.raises(ValueError, match=r"block.layers.1.mlp.pre_norm.weight: tied to final_norm_video.weight"):
        accelerate(model, FAST)


def test_global_hooks_are_named() -> None:
    model = happyhorse()
    handle = global_hooks.register_module_forward_hook(hook)
    try:
        with pytest.raises(ValueError, match=r"global forward hook of every module \(hook\)"):
            accelerate(model, FAST)
    finally:
        handle.remove()
    accelerate(model, FAST)


@pytest.mark.parametrize("make", [happyhorse, public])
def test_what_still_works_is_kept(make: Callable[[], Any]) -> None:
    expected = run(accelerate(make(), FAST))
    model = make()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model.register_forward_hook(lambda module, args, out: seen.append("after"))
    layers = model.block.layers
    before = [value.clone() for value in model.state_dict().values()]
    accelerate(model, FAST)
    layers[1].register_forward_hook(lambda *_: seen.append("layer"))
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert seen == ["before", "layer", "after"]
    restore(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("make", [happyhorse, public])
def test_changed_rotary_frequencies_are_kept(make: Callable[[], Any]) -> None:
    def changed(model: Any) -> Any:
        model.adapter.rope.bands = model.adapter.rope.bands * 1.5
        return model

    plain, ours = run(accelerate(make(), FAST)), run(accelerate(changed(make()), FAST))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True)) > 0.05
    if make is happyhorse:
        for a, b in zip(ours, run(changed(happyhorse())), strict=True):
            assert float((a - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: {"q_ranges": q + 5, "k_ranges": k}, r"within the \d+ tokens of the sequence, got \["),
        (lambda q, k: {"q_ranges": q.flip(1), "k_ranges": k}, r"within the \d+ tokens"),
        (lambda q, k: {"q_ranges": q, "k_ranges": k - 1}, r"within the \d+ tokens"),
        (lambda q, k: {"q_ranges": q, "k_ranges": k[1:]}, r"q_ranges and k_ranges \[R, 2\]"),
        (lambda q, k: {"q_ranges": q}, "got .* and NoneType"),
    ],
)
def test_local_ranges_are_checked(change: Callable[..., dict[str, torch.Tensor]], message: str) -> None:
    model, t = accelerate(public(), FAST), CASE.tensors
    handler = SimpleNamespace(**change(t["local.q_ranges"], t["local.k_ranges"]))
    with pytest.raises(ValueError, match=message):
        model(t["tokens"], t["coords"], t["modality"], None, handler)
    handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
    with pytest.raises(FloatingPointError, match="coords_mapping must be finite"):
        model(t["tokens"], t["coords"] * float("nan"), t["modality"], None, handler)


def test_layers_that_share_weights_stay_so() -> None:
    model, twin = happyhorse(), happyhorse()
    for m in (model, twin):
        m.block.layers[3].mlp.load_state_dict(m.block.layers[2].mlp.state_dict())
    model.block.layers[3].mlp = model.block.layers[2].mlp
    assert all(
        torch.equal(a, b) for a, b in zip(run(accelerate(model, FAST)), run(accelerate(twin, FAST)), strict=True)
    )
    restore(model)
    assert model.block.layers[3].mlp is model.block.layers[2].mlp


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        ("DistributedDataParallel", "pass what it wraps, model.module"),
        ("DataParallel", "pass what it wraps, model.module"),
        ("FullyShardedDataParallel", "whole models"),
        ("DeepSpeedEngine", "whole models"),
        ("PeftModel", "model.base_model.model"),
    ],
)
def test_a_wrapped_model_is_refused_by_name(wrapper: str, inner: str) -> None:
    def forwarded(self: Any, name: str) -> Any:  # FSDP, peft and DeepSpeed find attributes of what they wrap
        modules = vars(self)["_modules"]
        return modules[name] if name in modules else getattr(modules["module"], name)

    model = type(wrapper, (nn.Module,), {"__getattr__": forwarded})()
    model.module = happyhorse()
    with pytest.raises(TypeError, match="model must be a HappyHorse") as caught:
        accelerate(model, FAST)
    assert wrapper in str(caught.value)
    assert inner in str(caught.value)
    assert not is_accelerated(model.module)


class CPUOffloadWrapper:
    """As the public implementation has it: no module, and finds attributes of what it wraps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_what_is_wrapped_is_named_and_left_alone() -> None:
    inner = public()
    for wrapper, name in (
        (nn.ModuleDict({"net": inner}), "ModuleDict"),
        (CPUOffloadWrapper(inner), "CPUOffloadWrapper"),
    ):
        with pytest.raises(TypeError, match=rf"got {name} around one: pass what it wraps, model\.(net|model)"):
            accelerate(wrapper, FAST)
    with pytest.raises(TypeError, match=r"\(adapter, block.layers, final_norm_video, ...\), got dict$"):
        accelerate({}, FAST)  # type: ignore[type-var]
    assert type(inner) is DiTModel


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_models_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (1,))
    model = happyhorse()
    fully_shard(layer(model), mesh=mesh)
    with pytest.raises(ValueError, match=r"block.layers.1 is a FSDPModule"):
        accelerate(model, FAST)
    model = happyhorse()
    qkv = layer(model).attention.linear_qkv
    qkv.weight = nn.Parameter(distribute_tensor(qkv.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"attention.linear_qkv.weight is a DTensor"):
        accelerate(model, FAST)
    model = happyhorse()
    with pytest.raises(TypeError, match="got DistributedDataParallel"):
        accelerate(DistributedDataParallel(model), FAST)
    accelerate(model, FAST)  # data parallel: every rank has clips of its own


@pytest.mark.parametrize("where", ["inference.infra.distributed", "forward's module"])
def test_context_parallelism_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 1
    if where == "forward's module":
        monkeypatch.setattr(public_model, "get_cp_world_size", lambda: ranks)
    else:
        module = ModuleType(where)
        module.get_cp_world_size = lambda: ranks  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, where, module)
    model = accelerate(public(), FAST)
    run(model)
    ranks = 4
    with pytest.raises(ValueError, match=r"context parallelism must be off \(cp_size=1\), got a group of 4 ranks"):
        run(model)
    with pytest.raises(ValueError, match="group of 4 ranks"):
        accelerate(public(), FAST)
    run(accelerate(happyhorse(), FAST))  # which no group splits


def test_a_group_that_was_not_made_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def size() -> int:
        raise AssertionError("context parallel group is not initialized")

    monkeypatch.setattr(public_model, "get_cp_world_size", size)
    run(accelerate(public(), FAST))


@pytest.mark.parametrize("make", [happyhorse, public])
def test_hooks_that_would_not_run_are_named_at_the_next_call(make: Callable[[], Any]) -> None:
    model = make()
    old = layer(model)
    accelerate(model, FAST)
    expected = run(model)
    for attach, named in (
        (
            lambda: old.attention.linear_qkv.register_forward_hook(hook),
            "block.layers.1.attention.linear_qkv got a hook",
        ),
        (lambda: old.register_forward_pre_hook(hook), "block.layers.1 got a hook (hook)"),
        (lambda: model.adapter.video_embedder.register_forward_hook(hook), "adapter.video_embedder got a hook"),
        (lambda: model.final_norm_video.register_forward_hook(hook), "final_norm_video got a hook"),
        (lambda: layer(model).register_full_backward_hook(hook), "block.layers.1 got a hook"),
        (lambda: model.register_full_backward_hook(hook), "model got a hook"),
    ):
        handle = attach()
        with pytest.raises(ValueError, match="which does not run") as caught:
            run(model)
        assert named in str(caught.value)
        handle.remove()
    old.attention.linear_qkv.forward = hook  # as kohya's scripts put a LoRA in
    with pytest.raises(ValueError, match=r"layers.1.attention.linear_qkv got a forward of its own after accelerate"):
        run(model)
    del old.attention.linear_qkv.forward
    handle = layer(model).register_forward_hook(lambda module, args, out: args[0] * 2)
    with pytest.raises(ValueError, match=r"hook on block.layers.1 returned a value"):
        run(model)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    model.final_linear_video = Quantised(4, 4)
    with pytest.raises(ValueError, match="final_linear_video was replaced after accelerate, is a Quantised"):
        run(model)


def test_tiles_are_for_models_that_know_a_frames_columns() -> None:
    with pytest.raises(
        ValueError, match="sparsity must be TopK or TopP for a model object of the public implementation"
    ):
        accelerate(public(), FastConfig(backend="reference", sparsity=Tiles(1, 1, 1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.add_(1), ValueError, r"0 \(video\), 1 \(audio\) and 2 \(text\), got \[3\]"),
        (lambda m: m.sub_(1), ValueError, r"got \[-1\]"),
        (lambda m: m.float(), TypeError, "must be torch.int64 or .*torch.uint8, got torch.float32"),
        (lambda m: m.tolist(), TypeError, "must be a tensor of shape .*got list"),
        (lambda m: m[:-1], ValueError, r"modality_mapping must be of size \d+ in dimension 0"),
        (lambda m: m.to("meta"), ValueError, "must be on device cpu"),
    ],
)
def test_modalities_are_checked(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    model, t = accelerate(public(), FAST), CASE.tensors
    handler = SimpleNamespace(q_ranges=t["local.q_ranges"], k_ranges=t["local.k_ranges"])
    with pytest.raises(error, match=message):
        model(t["tokens"], t["coords"], change(t["modality"].clone()), None, handler)
    with pytest.raises(ValueError, match="x must have at least"):
        model(t["tokens"][:, :5], t["coords"], t["modality"], None, handler)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [happyhorse, public])
def test_published_weights_do_not_load_into_packed_layers(make: Callable[[], Any], strict: bool) -> None:
    model = make()
    published = {key: value.clone() for key, value in model.state_dict().items()}
    accelerate(model, FAST)
    before = [value.clone() for value in model.state_dict().values()]
    other = {key: value + 1 for key, value in published.items()}
    with pytest.raises(RuntimeError, match=r"must hold packed weights .*attention.*restore\(model\), load_state_dict"):
        model.load_state_dict(other, strict=strict)
    for part, prefix in ((model.block, "block."), (layer(model), "block.layers.1.")):
        tensors = {key.removeprefix(prefix): value for key, value in other.items() if key.startswith(prefix)}
        with pytest.raises(RuntimeError, match="must hold packed weights"):
            part.load_state_dict(tensors, strict=strict)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    model.load_state_dict(model.state_dict())
    model.load_state_dict({"final_norm_video.weight": published["final_norm_video.weight"] + 1}, strict=False)
    fp8 = accelerate(make(), FastConfig(backend="reference", precision="fp8"))
    with pytest.raises(RuntimeError, match="qkv_weight"):
        fp8.load_state_dict(model.state_dict(), strict=False)
