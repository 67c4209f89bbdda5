"""`hosts.diffusers` in transformers of diffusers' own classes: as near to float32 as diffusers, and gone again."""

import copy
import gc
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from tiny_transformers import TINY

import happyhorse_fast as hh
from happyhorse_fast.hosts import calls as host_calls
from happyhorse_fast.hosts import versions
from happyhorse_fast.hosts.diffusers import disable, enable

REGISTRY = attention_dispatch._AttentionBackendRegistry


def run(model, inputs):
    with torch.no_grad():
        result = model(**inputs, return_dict=False)
    return torch.cat([x.float().flatten() for x in result])


def choices(model):
    """What each processor has of its own, and what the registry lists."""
    found = [dict(vars(m.processor)) for m in model.modules() if hasattr(m, "processor")]
    return found, REGISTRY.get_active_backend()[0], list(REGISTRY.list_backends())


def to_float32(inputs):
    is_bf16 = lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16  # noqa: E731
    return {name: x.float() if is_bf16(x) else x for name, x in inputs.items()}


BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])


@BACKENDS
@pytest.mark.parametrize("name", TINY)
def test_as_near_to_float32_as_diffusers_itself(name, backend, monkeypatch):
    tiny = TINY[name]
    model, inputs = tiny.model(), tiny.inputs()
    before, untouched = run(model, inputs), choices(model)
    wanted = run(copy.deepcopy(model).float(), to_float32(inputs))
    calls = enable(model, backend=backend)
    after = run(model, inputs)
    assert (calls.taken, sum(calls.left.values())) == (tiny.taken, tiny.left), str(calls)
    error = lambda x: (x - wanted).norm()  # noqa: E731
    assert error(after) <= 1.2 * error(before)
    assert error(before) <= 2e-2 * wanted.norm()
    monkeypatch.setattr(host_calls, "attention", lambda q, k, v, **_: hh.attention(q, k, v, scale=0.01))
    assert error(run(model, inputs)) > 2 * error(before), "the model does not show what attention gives"
    disable(model)
    assert choices(model) == untouched
    assert torch.equal(run(model, inputs), before)


def test_another_model_keeps_its_backend():
    tiny = TINY["Flux"]
    ours, other, inputs = tiny.model(), tiny.model(), tiny.inputs()
    before = choices(other)[:2]
    calls = enable(ours, backend="reference")
    run(other, inputs)
    assert calls.taken == 0 and choices(other)[:2] == before
    with pytest.raises(ValueError, match="FluxTransformer2DModel is enabled already"):
        enable(ours)
    disable(ours)
    with pytest.raises(ValueError, match="FluxTransformer2DModel is not enabled"):
        disable(ours)


def test_what_does_not_fit_runs_on_the_backend_that_was_chosen_before():
    tiny = TINY["Flux"]
    model, inputs = tiny.model().float(), to_float32(tiny.inputs())
    chosen = attention_dispatch.AttentionBackendName._NATIVE_MATH
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    processors[0]._attention_backend = chosen
    own, seen = REGISTRY._backends[chosen], []
    REGISTRY._backends[chosen] = lambda **given: seen.append(given["query"].shape) or own(**given)
    try:
        calls = enable(model, backend="reference")
        run(model, inputs)
    finally:
        REGISTRY._backends[chosen] = own
    assert calls.taken == 0 and dict(calls.left) == {"query is float32, not bfloat16": 2}
    assert len(seen) == 1, "one of two layers had a backend of its own"
    disable(model)
    assert [p._attention_backend for p in processors] == [chosen, None]


def test_a_model_that_is_gone_leaves_nothing_in_the_registry():
    before = list(REGISTRY.list_backends())
    model = TINY["Flux"].model()
    enable(model)
    assert len(REGISTRY.list_backends()) == len(before) + 1
    del model
    gc.collect()
    assert REGISTRY.list_backends() == before


def test_a_choice_made_since_stays():
    model = TINY["Flux"].model()
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    enable(model)
    processors[0]._attention_backend = attention_dispatch.AttentionBackendName.NATIVE
    disable(model)
    assert [p._attention_backend for p in processors] == [attention_dispatch.AttentionBackendName.NATIVE, None]


def test_a_window_and_chosen_blocks_reach_the_calls_of_their_size():
    tiny = TINY["Wan"]
    model, inputs = tiny.model(), tiny.inputs()  # 3 frames of 6 x 8 tokens
    dense = run(model, inputs)
    layout = hh.Layout(frames=3, frame_tokens=48, audio=0, text=0)
    for sparsity in (hh.BlockMap.frame_window(layout, 0), hh.hosts.Chosen(hh.TopK(0.5), tokens=144)):
        calls = enable(model, backend="reference", strict=True, sparsity=sparsity)
        sparse = run(model, inputs)
        assert calls.taken == 4
        assert 0.02 < (sparse - dense).norm() / dense.norm() < 1
        disable(model)


def test_a_compiled_model_takes_it_in_one_graph():
    tiny = TINY["Flux"]
    model, inputs = tiny.model(), tiny.inputs()
    enable(model, backend="reference")
    wanted = run(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(run(compiled, inputs), wanted)
    disable(model)


def test_scale_strict_context_parallelism_and_lse():
    tiny = TINY["Flux"]
    model = tiny.model()
    calls = enable(model, backend="reference")
    backend = next(m.processor._attention_backend for m in model.modules() if hasattr(m, "processor"))
    x = torch.randn(1, 20, 2, 32).bfloat16()
    how = {"backend": backend, "scale": 0.7, "enable_gqa": True}
    out = attention_dispatch.dispatch_attention_fn(x, x[:, :, :1], x[:, :, 1:], **how)
    heads = (x.transpose(1, 2), x[:, :, :1].transpose(1, 2), x[:, :, 1:].transpose(1, 2))
    assert torch.equal(out, hh.attention(*heads, scale=0.7).transpose(1, 2)) and calls.taken == 1
    with pytest.raises(ValueError, match="does not support setting `return_lse=True`"):  # diffusers' own
        attention_dispatch.dispatch_attention_fn(x, x, x, attention_kwargs={"return_lse": True}, backend=backend)
    with pytest.raises(AttributeError):  # diffusers' own, of what is no configuration
        attention_dispatch.dispatch_attention_fn(x, x, x, backend=backend, parallel_config=object())
    assert set(calls.left) == {"return_lse", "context parallelism"}
    disable(model)
    calls = enable(model.float(), backend="reference", strict=True)
    with pytest.raises(ValueError, match="strict: diffusers would run attention itself: query is float32"):
        run(model, to_float32(tiny.inputs()))
    disable(model)


def test_what_is_no_model_of_diffusers_is_refused():
    with pytest.raises(TypeError, match=r"transformer must be a module, such as pipe.transformer; got str"):
        enable("pipe")
    with pytest.raises(ValueError, match="Linear has no attention processor with _attention_backend"):
        enable(torch.nn.Linear(1, 1))


def test_another_version_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr("diffusers.__version__", "0.43.0")
    monkeypatch.setattr(versions, "_TOLD", set())
    model = TINY["Flux"].model()
    for _ in range(2):
        enable(model)
        disable(model)
    assert [r.getMessage() for r in caplog.records] == [
        f"diffusers is 0.43.0, and happyhorse_fast was tested with {versions.TESTED['diffusers']}"
    ]
    monkeypatch.delattr(attention_dispatch, "dispatch_attention_fn")
    with pytest.raises(ImportError, match=r"0.43.0 does not have diffusers.* of .*dispatch_attention_fn"):
        enable(model)


def test_without_diffusers_one_sentence_says_so():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import torch, happyhorse_fast as hh\n"
        "try: hh.hosts.diffusers.enable(torch.nn.Linear(1, 1))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hosts.diffusers needs diffusers: diffusers is not installed (pip install"), done


def wan_pipeline():
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    vae = diffusers.AutoencoderKLWan(**sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
    pipe = diffusers.WanPipeline(**parts, transformer=TINY["Wan"].model())
    size = {"height": 96, "width": 128, "num_frames": 9, "guidance_scale": 1.0}
    return pipe, {"prompt_embeds": torch.randn(1, 7, 16).bfloat16(), **size}


def flux_pipeline():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=2, norm_num_groups=1)
    parts = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(**parts, vae=vae, scheduler=scheduler, transformer=TINY["Flux"].model())
    text = {"prompt_embeds": torch.randn(1, 7, 16).bfloat16(), "pooled_prompt_embeds": torch.randn(1, 8).bfloat16()}
    return pipe, {**text, "height": 32, "width": 32}


@pytest.mark.slow
@pytest.mark.parametrize("made", [wan_pipeline, flux_pipeline])
def test_a_pipeline_denoises_to_the_same_latents(made):
    pipe, inputs = made()
    pipe.set_progress_bar_config(disable=True)

    def denoised():
        noise = torch.Generator().manual_seed(0)
        return pipe(**inputs, num_inference_steps=2, generator=noise, output_type="latent")[0].float()

    before = denoised()
    calls = enable(pipe.transformer, backend="reference", strict=True)
    after = denoised()
    disable(pipe.transformer)
    assert calls.taken == 2 * TINY["Wan" if made is wan_pipeline else "Flux"].taken
    assert (after - before).norm() <= 1e-2 * before.norm() and not torch.equal(after, before)
    assert torch.equal(denoised(), before)
