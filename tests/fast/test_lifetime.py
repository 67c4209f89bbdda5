"""Models end, are copied, moved, converted and wrapped: each ends at once, keeps its bits, or says why not."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from logged import logs
from safetensors.torch import load_file, save_file
from small_models import CONFIG, PublicLayout, clip, eager_model, fast_model, packed, same

import happyhorse_fast as hh
from happyhorse_fast.checkpoint.load import load
from happyhorse_fast.fast.config import FastConfig, TopK
from happyhorse_fast.fast.memory import peak_memory
from happyhorse_fast.sampler import sample
from happyhorse_fast.tokens import ClipTokens

REFERENCE = FastConfig(backend="reference")


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def call(model: Any, public: bool = False, **sizes: int) -> Any:
    inputs = clip(**sizes)
    with torch.no_grad():
        return model(*(packed(inputs) if public else inputs))


# The end --------------------------------------------------------------------------------------------------------------


def accelerated(folder: Path) -> Any:
    model = fast_model()
    call(model)
    return model


def of_the_public_class(folder: Path) -> Any:
    model = fast_model(public=True)
    call(model, public=True)
    return model


def sampled_sparsely(folder: Path) -> Any:
    model = fast_model(sparsity=TopK(0.5), exact_first_steps=1)
    sample(model, *clip(), steps=2, progress=False)
    return model


def restored(folder: Path) -> Any:
    return hh.restore(accelerated(folder))


def loaded(folder: Path) -> Any:
    hh.save_checkpoint(eager_model(), folder / "published")
    model = load(folder / "published", config=CONFIG, fast=REFERENCE, progress=False)
    call(model)
    return model


def loaded_packed(folder: Path) -> Any:
    hh.save_packed(fast_model(precision="fp8"), folder / "packed")
    model = load(folder / "packed", fast=FastConfig(precision="fp8", backend="reference"), progress=False)
    call(model)
    return model


def copied(folder: Path) -> Any:
    model = copy.deepcopy(accelerated(folder))
    call(model)
    return model


def exported(folder: Path) -> Any:
    model = accelerated(folder)
    with torch.no_grad():
        torch.export.export(model, clip())
    model.fast.forget()  # a program of torch.export keeps its constants until a collection
    gc.collect()
    return model


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "make",
    [accelerated, of_the_public_class, sampled_sparsely, restored, loaded, loaded_packed, copied, exported],
)
def test_a_model_is_gone_with_its_last_name(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    held = [weakref.ref(model), *(weakref.ref(x) for x in (*model.parameters(), *model.buffers()))]
    if hasattr(model, "fast"):
        held += [weakref.ref(state.cos_sin) for state in model.fast.clips.values()]
        held += [weakref.ref(layer) for layer in model.fast.originals]
    del model
    assert [ref() is not None for ref in held].count(True) == 0


FIRST_OF_A_PROCESS = """
import gc, sys, weakref
import torch
import happyhorse_fast as hh
from safetensors.torch import load_file

folder, what = sys.argv[1:]
config = hh.ModelConfig(**eval(open(folder + "/config").read()))
inputs = load_file(folder + "/in.safetensors")
gc.collect()
gc.disable()

def made():
    if what == "packed":
        return hh.load(folder + "/packed", progress=False)
    fast = None if what == "eager" else hh.FastConfig(backend="reference")
    return hh.load(folder + "/published", config=config, fast=fast, progress=False)

def used():
    model = made()
    model(**inputs)
    return weakref.ref(model)

print(used()() is None)
"""


@pytest.mark.parametrize("what", ["fast", *(pytest.param(w, marks=pytest.mark.slow) for w in ("eager", "packed"))])
def test_the_first_model_of_a_process_is_gone_too(what: str, tmp_path: Path) -> None:
    hh.save_checkpoint(eager_model(), tmp_path / "published")
    hh.save_packed(fast_model(), tmp_path / "packed")
    (tmp_path / "config").write_text(repr(CONFIG.to_dict()))
    save_file(dict(zip(("video", "audio", "text"), clip(), strict=True)), tmp_path / "in.safetensors")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_OF_A_PROCESS, str(tmp_path), what], capture_output=True, text=True
    )
    assert run.stdout.strip() == "True", run.stdout + run.stderr


@pytest.mark.usefixtures("no_collector")
def test_the_first_stages_model_is_gone_before_the_second_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from happyhorse_fast.checkpoint import load as checkpoint
    from happyhorse_fast.cli import app

    hh.save_checkpoint(eager_model(), tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    video, audio, text = clip()
    save_file({"video": video, "audio": audio, "text": text}, tmp_path / "in.safetensors")
    as_it_is, held = checkpoint.load, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert [ref() for ref in held] == [None] * len(held), "the first model is still held"
        model = as_it_is(*args, **kwargs)
        held.extend(weakref.ref(x) for x in (model, *model.buffers()))
        return model

    monkeypatch.setattr(checkpoint, "load", watched)
    config = str(tmp_path / "config.json")
    arguments = ["sample", str(tmp_path / "model"), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    arguments += ["--config", config, "--fast", "bf16", "--steps", "1", "--sr-checkpoint", str(tmp_path / "model")]
    arguments += ["--sr-config", config, "--size", "4", "16", "--sr-steps", "1", "--device", "cpu", "--json"]
    with logs("plain torch"):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(held) > 2


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_a_deep_copy_is_a_model_of_its_own(public: bool, called: bool) -> None:
    model = fast_model(public)
    expected = call(fast_model(public), public)
    if called:
        call(model, public)
    other = copy.deepcopy(model)
    assert same(call(other, public), expected)
    assert same(call(other, public, frames=3), call(model, public, frames=3))
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.zero_()
        for layer in other.fast.originals:
            for parameter in layer.parameters():
                parameter.zero_()
    other.load_state_dict(other.state_dict())
    assert same(call(model, public), expected)
    hh.restore(other)
    assert same(call(model, public), expected)
    hh.restore(model)
    if not public:
        assert same(call(model), call(eager_model()))


@pytest.mark.usefixtures("no_collector")
def test_a_copy_outlives_its_original() -> None:
    model = fast_model()
    expected = call(model)
    other = copy.deepcopy(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert same(call(other), expected)


def test_a_shallow_copy_shares_its_layers_and_says_so_when_they_are_gone() -> None:
    model = fast_model()
    expected = call(model)
    other = copy.copy(model)
    assert same(call(other), expected)
    hh.restore(other)
    with pytest.raises(RuntimeError, match=r"packed layers are gone: restore\(\) was called"):
        call(model)


def test_a_fallback_is_announced_where_the_model_is_accelerated() -> None:
    with logs("plain torch"):
        hh.accelerate(eager_model())


def test_pickle_is_refused_by_name() -> None:
    model = fast_model()
    with pytest.raises(TypeError, match=r"does not pickle .*save_packed"):
        pickle.dumps(model)
    with pytest.raises(TypeError, match=r"does not pickle .*save_packed"):
        torch.save(model, io.BytesIO())


def test_a_call_that_runs_while_another_thread_restores_ends_right() -> None:
    model, expected = fast_model(), call(fast_model())

    def restored_meanwhile(layer: int, hidden: torch.Tensor) -> None:
        if layer == 0:
            thread = threading.Thread(target=hh.restore, args=(model,))
            thread.start()
            thread.join()

    with torch.no_grad():
        assert same(model(*clip(), on_layer=restored_meanwhile), expected)
    assert same(call(model), call(eager_model()))


# Moves and conversions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("public", [False, True])
def test_a_move_takes_what_was_made_for_a_clip_along(public: bool) -> None:
    model = fast_model(public)
    expected = call(model, public)
    for state in model.fast.clips.values():
        assert state.device.type == "cpu"
    model.to("meta")
    assert not model.fast.clips, "states of the device it left"
    model.to_empty(device="cpu")
    model.load_state_dict(fast_model(public).state_dict())
    assert same(call(model, public), expected)


CONVERSIONS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "to both": lambda m: m.to("cpu", torch.float32),
    "type": lambda m: m.type(torch.float32),
}


@pytest.mark.quick(9)
@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_an_accelerated_model_keeps_its_dtypes(name: str, precision: str, public: bool) -> None:
    model = fast_model(public, precision=precision)
    before = {key: (value.dtype, value.clone()) for key, value in model.state_dict().items()}
    expected = call(model, public)
    parts = [model] if name == "bfloat16" else [model, model.block, model.block.layers[0]]
    for part in parts:
        with pytest.raises(TypeError, match=r"keeps its dtypes .* got a conversion of \S+ from .*restore\(model\)"):
            CONVERSIONS[name](part)
    after = model.state_dict()
    assert all(after[k].dtype == dtype and same(after[k].float(), v.float()) for k, (dtype, v) in before.items())
    assert same(call(model, public), expected)
    assert model.to("cpu") is model and model.cpu() is model and model.eval() is model


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("name", ["half", "double", "bfloat16", "to"])
def test_a_model_of_other_dtypes_is_not_accelerated(name: str, public: bool) -> None:
    model: Any = PublicLayout(eager_model()) if public else eager_model()
    CONVERSIONS[name](model)
    with pytest.raises(
        ValueError, match=r"model must have \S+ in .* to be accelerated, got torch.(float16|float64|bfloat16)"
    ):
        hh.accelerate(model, REFERENCE)
    assert type(model) is (PublicLayout if public else hh.HappyHorse)


def test_float32_linears_as_trained_are_accelerated() -> None:
    model = eager_model()
    model.float()
    assert same(call(hh.accelerate(model, REFERENCE)), call(fast_model()))


def test_a_model_accelerated_in_inference_mode_is_an_ordinary_one() -> None:
    model = eager_model()
    with torch.inference_mode():
        hh.accelerate(model, REFERENCE)
        expected = call(model)
    assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))
    model.load_state_dict(fast_model().state_dict())
    assert same(call(model), expected)
    with torch.inference_mode():
        hh.restore(model)
    assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))


# Wrappers -------------------------------------------------------------------------------------------------------------


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", dynamic=False)


def test_torch_compiles_wrapper_is_seen_through(tmp_path: Path) -> None:
    expected = call(fast_model())
    wrapper = compiled(eager_model())
    hh.save_checkpoint(wrapper, tmp_path / "published")
    hh.save_checkpoint(wrapper.state_dict(), tmp_path / "of its keys")
    for name in ("published", "of its keys"):
        assert same(call(load(tmp_path / name, config=CONFIG, fast=REFERENCE, progress=False)), expected)
    assert {e.backend for e in hh.explain(wrapper)} == {"eager"}
    assert hh.accelerate(wrapper, REFERENCE) is wrapper
    assert same(call(wrapper), expected)
    assert {e.backend for e in hh.explain(wrapper)} == {"reference"}
    with pytest.raises(ValueError, match="accelerated already"):
        hh.accelerate(wrapper, REFERENCE)
    with pytest.raises(ValueError, match="use save_packed"):
        hh.save_checkpoint(wrapper, tmp_path / "no")
    hh.save_packed(wrapper, tmp_path / "packed")
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "packed" / "model.safetensors"))
    assert same(call(load(tmp_path / "packed", fast=REFERENCE, progress=False)), expected)
    runs = [
        sample(model, *clip(), steps=2, noise=torch.Generator().manual_seed(0), progress=False)
        for model in (wrapper, fast_model())
    ]
    assert same(*runs)
    grid = ClipTokens(T=2, H=4, W=8, audio=5)
    assert peak_memory(wrapper, grid, 6) == peak_memory(fast_model(), grid, 6)
    assert hh.restore(wrapper) is wrapper
    assert {e.backend for e in hh.explain(wrapper)} == {"eager"}
    assert same(call(wrapper), call(eager_model()))


def test_a_deep_copy_of_a_compiled_model_is_compiled() -> None:
    wrapper = compiled(fast_model(layers=1))
    expected = call(wrapper)
    other = copy.deepcopy(wrapper)
    assert type(other) is type(wrapper) and other._orig_mod is not wrapper._orig_mod
    assert same(call(other), expected)
    hh.restore(other)
    assert same(call(wrapper), expected)


@pytest.mark.parametrize("public", [False, True])
def test_compiled_layers_are_seen_through(public: bool, tmp_path: Path) -> None:
    model: Any = eager_model()
    model.block.layers[0] = compiled(model.block.layers[0])
    model.block.layers[1].mlp = compiled(model.block.layers[1].mlp)
    if not public:
        hh.save_checkpoint(model, tmp_path / "published")
        again = load(tmp_path / "published", config=CONFIG, progress=False)
        assert same(call(again), call(eager_model()))
    model = PublicLayout(model) if public else model
    expected = call(fast_model(public), public)
    assert same(call(hh.accelerate(model, REFERENCE), public), expected)
    packed_layer = model.block.layers[0]
    model.block.layers[0] = compiled(packed_layer)
    assert same(call(model, public), expected)
    hh.restore(model)
    assert type(model.block.layers[0]).__name__ == "OptimizedModule"


def test_a_model_compiled_in_place() -> None:
    torch._dynamo.reset()
    model = eager_model(layers=1)
    model.compile(backend="eager", dynamic=False)
    hh.accelerate(model, REFERENCE)
    expected = call(fast_model(layers=1))
    assert same(call(model), expected)
    assert same(call(copy.deepcopy(model)), expected)
    hh.restore(model)
    assert same(call(model), call(eager_model(layers=1)))
