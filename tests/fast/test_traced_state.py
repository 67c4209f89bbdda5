"""What is kept for later calls is made of real tensors, whatever traced the call that made it; and it does not grow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import clip, fast_model, packed, same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from happyhorse_fast.fast.compiled import untraced
from happyhorse_fast.fast.config import TopK
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.pony.weights import load_codecs
from happyhorse_fast.sampler.super_resolve import signal_table

Inputs = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def no_remembered_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def exported(model: Any, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs).module()(*inputs)


def exported_strictly(model: Any, inputs: Inputs) -> Any:
    return torch.export.export(model, inputs, strict=True).module()(*inputs)


def compiled(model: Any, inputs: Inputs) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)(*inputs)


def proxied(model: Any, inputs: Inputs) -> Any:
    return make_fx(model)(*inputs)(*inputs)


def proxied_fakes(model: Any, inputs: Inputs) -> Any:
    return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)(*inputs)


def proxied_symbols(model: Any, inputs: Inputs) -> Any:
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)(*inputs)


def functionalized(model: Any, inputs: Inputs) -> Any:
    return torch.func.functionalize(model)(*inputs)


def with_tangents(model: Any, inputs: Inputs) -> Any:
    return torch.func.vjp(model, *inputs)[0]


def mapped(model: Any, inputs: Inputs) -> Any:
    return [out[0] for out in torch.vmap(model)(*(x[None] for x in inputs))]


def jit_traced(model: Any, inputs: Inputs) -> Any:
    return torch.jit.trace(model, inputs, check_trace=False)(*inputs)


def inferred(model: Any, inputs: Inputs) -> Any:
    with torch.inference_mode():
        return model(*inputs)


def faked(model: Any, inputs: Inputs) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(*(mode.from_tensor(x) for x in inputs))
    assert all(isinstance(x, FakeTensor) for x in out)


TRACERS = (
    exported, exported_strictly, compiled, proxied, proxied_fakes, proxied_symbols, functionalized, with_tangents,
    mapped, jit_traced, inferred, faked,
)  # fmt: skip
MAY_REFUSE = (mapped, proxied, functionalized)
"""Tracers that may raise, torch's ops having no rule for them; the model must be right afterwards all the same."""


def tensors_kept(model: Any) -> list[torch.Tensor]:
    states = [*model.fast.clips.values(), *vars(model.fast.in_graphs).values()]
    return [model.fast.bands, *(tensor for state in states for tensor in state.tensors())]


@pytest.mark.quick(5)
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    "options", [{}, {"precision": "fp8", "attention": "fp8", "sparsity": TopK(0.5), "mlp_rows": 256}]
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_the_live_model_is_right_after_a_tracer_saw_a_new_shape(
    tracer: Callable[[Any, Inputs], Any], options: dict[str, Any]
) -> None:
    inputs, other = clip(), clip(3, 64)
    fresh, model = fast_model(**options), fast_model(**options)
    with torch.no_grad():
        expected, expected_other = fresh(*inputs), fresh(*other)
        model(*other)
        try:
            result = tracer(model, inputs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            if tracer not in MAY_REFUSE:
                raise
        else:
            assert result is None or same(result, expected), "what the tracer gave"
        for x in tensors_kept(model):
            assert type(x) is torch.Tensor and not x.is_inference() and not x.requires_grad
            assert not torch._is_functional_tensor(x) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        assert same(model(*inputs), expected)
        assert same(model(*other), expected_other)
    if tracer is exported:
        again = exported(model, inputs)
        assert same(again, expected)


def test_tangents_are_refused() -> None:
    """torch has no forward derivative of an op of its own, and would give those of the ends of the model alone."""
    inputs, model = clip(), fast_model()
    with pytest.raises(ValueError, match="video must have no tangent"):
        torch.func.jvp(lambda video: model(video, *inputs[1:])[0], inputs[:1], inputs[:1])


@pytest.mark.parametrize("public", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shape_first_seen_in_inference_mode_can_be_compiled_and_exported(public: bool) -> None:
    inputs = packed(clip()) if public else clip()
    model = fast_model(public)
    with torch.inference_mode():
        expected = model(*inputs)
    with torch.no_grad():
        assert same(model(*inputs), expected)
        result = torch.compile(model, backend="aot_eager", fullgraph=not public, dynamic=False)(*inputs)
        assert same(result, expected)


def test_the_public_signature_is_right_after_tracers() -> None:
    inputs, other = packed(clip()), packed(clip(3, 64))
    model, fresh = fast_model(public=True), fast_model(public=True)
    with torch.no_grad():
        expected = fresh(*inputs)
        model(*other)
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for _ in range(2):
            assert same(compiled(*inputs), expected)
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with fakes, pytest.raises(TypeError, match="coords_mapping must hold data"):
            model(*(fakes.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))
        assert same(model(*inputs), expected)


def test_weights_that_change_are_seen() -> None:
    inputs = clip()
    options: dict[str, Any] = {"precision": "fp8", "attention": "int8_qk"}
    model, donor = fast_model(**options), fast_model(**options)
    with torch.no_grad():
        model(*inputs)
        for layer in donor.block.layers:
            layer.qk_scale.mul_(1.5)
            layer.qk_norm.add_(8)  # past what a softmax without a maximum takes
        donor.adapter.rope.bands.mul_(0.5)
        model.load_state_dict(donor.state_dict())
        donor.load_state_dict(donor.state_dict())
        results = model(*inputs)
        assert same(results, donor(*inputs)) and all(x.isfinite().all() for x in results)
        assert all(layer.bound.effective > LIMIT for layer in model.block.layers)


@pytest.mark.slow
def test_two_hundred_shapes_leave_two_behind() -> None:
    model, public = fast_model(layers=1, sparsity=TopK(0.5)), fast_model(public=True, layers=1)
    states: list[weakref.ref[Any]] = []
    with torch.no_grad():
        for text in range(2, 202):
            inputs = clip(1, 2, 2, text)
            model(*inputs)
            if text % 4 == 0:
                public(*packed(inputs))
                states.append(weakref.ref(list(public.fast.clips.values())[-1]))
            states.append(weakref.ref(list(model.fast.clips.values())[-1]))
            if text == 20:
                gc.collect()
                held = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    gc.collect()
    assert sum(state() is not None for state in states) == 4
    assert sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()) <= held


def test_what_is_built_untraced_is_ordinary() -> None:
    with FakeTensorMode(), torch.inference_mode(), torch.device("meta"), untraced():
        x = torch.ones(2)
    assert type(x) is torch.Tensor and not x.is_inference() and x.device.type == "cpu"


def test_tables_and_codecs_first_read_under_a_tracer() -> None:
    load_codecs.cache_clear()
    with FakeTensorMode():
        load_codecs()
        signal_table()
    assert not isinstance(signal_table(), FakeTensor)
    codecs = load_codecs()
    assert not any(isinstance(x, FakeTensor) for codec in codecs for x in vars(codec).values())


def test_a_capture_asks_for_a_call_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from happyhorse_fast.fast import state as fast_state

    inputs, model = clip(), fast_model()
    monkeypatch.setattr(fast_state, "is_capturing", lambda device: True)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="must be captured after a call with the same clip's shape"):
            model(*inputs)
        monkeypatch.undo()
        model(*inputs)
        monkeypatch.setattr(fast_state, "is_capturing", lambda device: True)
        model(*inputs)
        monkeypatch.undo()
        state = weakref.ref(next(iter(model.fast.clips.values())))
        for text in (7, 8, 9):
            model(*clip(text=text))
    assert state() is not None, "a CUDA graph reads it, and holds no reference"
