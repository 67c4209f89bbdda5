"""The override of `hosts.comfyui`, and the nodes of examples/comfyui_happyhorse_fast, in a stand-in of ComfyUI."""

import copy
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import happyhorse_fast as hh
from happyhorse_fast.hosts import Calls, comfyui, versions

EXAMPLE = Path(__file__).parents[2] / "examples" / "comfyui_happyhorse_fast"


def host_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **_):
    """An attention function with ComfyUI's arguments and layouts."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def called(options, *args, **kwargs):
    """As ComfyUI calls it: the override gets the function, and what it was called with."""
    kwargs = {"_inside_attn_wrapper": True, "transformer_options": options, **kwargs}
    return options[comfyui.OPTION](host_attention, *args, **kwargs)


class Model:
    """ComfyUI's ModelPatcher, as far as a node sees it."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        return Model(copy.deepcopy(self.model_options))


def drawn(skip_reshape, heads=(4, 4), n=140, m=160, d=32, dtype=torch.bfloat16):
    shapes = ((2, heads[0], n, d), (2, heads[1], m, d), (2, heads[1], m, d))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return tensors if skip_reshape else [x.transpose(1, 2).flatten(2) for x in tensors]


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 160), (2, 1, 160), (1, 160)])
def test_layouts_and_masks_of_keys(mask, skip_reshape, skip_output_reshape):
    model, calls = comfyui.enable(Model({}), backend="reference", strict=True)
    qkv = drawn(skip_reshape)
    if mask is not None:
        mask = torch.rand(mask) < 0.7
        mask[..., 0] = True
    how = {"mask": mask, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    out = called(model.model_options["transformer_options"], *qkv, 4, **how)
    exact = host_attention(*(x.double() for x in qkv), 4, **how)
    error = (host_attention(*qkv, 4, **how).double() - exact).norm()
    assert out.shape == exact.shape and (out.double() - exact).norm() <= 1.5 * error
    assert calls.taken == 1


def test_fewer_heads_of_keys_precision_and_scale():
    model, calls = comfyui.enable(Model({}), backend="reference", strict=True)
    options = model.model_options["transformer_options"]
    for skip_reshape in (False, True):
        q, k, v = drawn(skip_reshape, heads=(4, 2))
        how = {"attn_precision": torch.float32, "skip_reshape": skip_reshape, "scale": 0.1}
        out = called(options, q, k, v, 4, skip_output_reshape=True, **how)
        assert torch.equal(called(options, q, k, v, 4, **how), out.transpose(1, 2).flatten(2))
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (-1, 32)).transpose(1, 2) for x in (q, k, v))
        assert torch.equal(out, hh.attention(q, k, v, scale=0.1))
    assert calls.taken == 4


@pytest.mark.parametrize(
    ("change", "how", "reason"),
    [
        ({"dtype": torch.float16}, {}, "query is float16, not bfloat16"),
        ({}, {"mask": torch.zeros(140, 160).bfloat16()}, "attn_mask is bfloat16: only bool masks are read"),
        ({}, {"novel": 1}, "argument novel"),
        ({}, {"skip_reshape": True}, "query, key and value are laid out otherwise than skip_reshape says"),
    ],
)
def test_what_does_not_fit_runs_as_before(change, how, reason):
    qkv = drawn(False, **change)
    plain, calls = comfyui.enable(Model({}), backend="reference")
    out = called(plain.model_options["transformer_options"], *qkv, 4, **how)
    assert torch.equal(out, host_attention(*qkv, 4, **how))
    assert dict(calls.left) == {reason: 1}
    other = lambda func, *args, **kwargs: 2 * func(*args, **kwargs)  # noqa: E731  # another node's override gets it
    given = Model({"transformer_options": {comfyui.OPTION: other, "kept": 1}})
    options = comfyui.enable(given, backend="reference")[0].model_options["transformer_options"]
    assert torch.equal(called(options, *qkv, 4, **how), 2 * out) and options["kept"] == 1
    assert given.model_options["transformer_options"][comfyui.OPTION] is other, "the model stays as it is"
    strict, _ = comfyui.enable(Model({}), backend="reference", strict=True)
    with pytest.raises(ValueError, match="strict: ComfyUI would run attention itself"):
        called(strict.model_options["transformer_options"], *qkv, 4, **how)


def test_float16_on_request_is_bf16_inside():
    q, k, v = drawn(True, dtype=torch.float16)
    calls = Calls("test", backend="reference", float16=True, strict=True)
    out = calls(q, k, v, own=lambda: pytest.fail("the host's"))
    assert out.dtype == torch.float16
    assert torch.equal(out, hh.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).half())


def test_a_clone_of_the_clone_keeps_the_override_and_its_count():
    model, calls = comfyui.enable(Model({}), backend="reference")
    called(model.clone().model_options["transformer_options"], *drawn(False), 4)
    assert calls.taken == 1
    with pytest.raises(TypeError, match="model must be a MODEL of ComfyUI"):
        comfyui.enable(object())


# The nodes ------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """ComfyUI's wish to cancel."""


@pytest.fixture
def host(monkeypatch):
    """Stand-ins of the modules that the nodes import; what they were asked for."""
    seen = types.SimpleNamespace(progress=[], previews=[], unloaded=0, cancel_after=None)

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total, preview):
            seen.progress.append((value, total, preview))

    class Wan22:
        def process_out(self, latent):
            return latent * 2 + 1

    class Previewer:
        def decode_latent_to_preview_image(self, kind, x0):
            seen.previews.append((kind, tuple(x0.shape)))
            return "picture"

    def throw_exception_if_processing_interrupted():
        if len(seen.progress) == seen.cancel_after:
            raise Interrupted

    def unload_all_models():
        seen.unloaded += 1

    def module(name, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    management = module(
        "comfy.model_management",
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
        unload_all_models=unload_all_models,
        get_torch_device=lambda: torch.device("cpu"),
    )
    module("comfy", model_management=management, __path__=[])
    module("comfy.latent_formats", Wan22=Wan22)
    module("comfy.utils", ProgressBar=ProgressBar)
    module("latent_preview", get_previewer=lambda device, latent_format: Previewer())
    module("comfyui_version", __version__=versions.TESTED["ComfyUI"])
    return seen


@pytest.fixture
def nodes(monkeypatch):
    """The package, imported as ComfyUI imports a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("custom_nodes_hh", EXAMPLE / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_nodes_hh", package)
    spec.loader.exec_module(package)
    yield package
    sys.modules.pop("custom_nodes_hh.nodes", None)


def test_every_node_takes_and_gives_what_it_says(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        code = getattr(node, node.FUNCTION).__code__
        assert set(inputs) == set(code.co_varnames[1 : code.co_argcount])
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES) and node.CATEGORY


@pytest.mark.parametrize("name", ["workflow_api", "attention_workflow_api"])
def test_a_workflow_asks_for_what_its_nodes_take(name, nodes):
    workflow = json.loads((EXAMPLE / f"{name}.json").read_text())
    ours = 0
    for step in workflow.values():
        links = [value for value in step["inputs"].values() if isinstance(value, list)]
        assert all(source in workflow for source, _ in links)
        if step["class_type"] in nodes.NODE_CLASS_MAPPINGS:
            ours += 1
            wanted = nodes.NODE_CLASS_MAPPINGS[step["class_type"]].INPUT_TYPES()["required"]
            assert set(step["inputs"]) == set(wanted)
            for key, kind in wanted.items():
                assert not isinstance(kind[0], list) or step["inputs"][key] in kind[0], key
    assert ours


def test_the_attention_node_clones(nodes, host, caplog, monkeypatch):
    model = Model({})
    (ours,) = nodes.NODE_CLASS_MAPPINGS["HappyHorseFastAttention"]().apply(model, "reference", False, False)
    assert comfyui.OPTION in ours.model_options["transformer_options"] and model.model_options == {}
    assert not caplog.records
    monkeypatch.setattr(sys.modules["comfyui_version"], "__version__", "0.4.0")
    monkeypatch.setattr(versions, "_TOLD", set())
    nodes.NODE_CLASS_MAPPINGS["HappyHorseFastAttention"]().apply(model, "reference", False, False)
    assert "ComfyUI is 0.4.0, and happyhorse_fast was tested with" in caplog.text


def test_a_packed_model_loads_samples_shows_and_cancels(nodes, host, tmp_path, monkeypatch):
    config = hh.ModelConfig.preset("tiny").replace(num_layers=1, mm_layers=(), gelu7_layers=(), local_attn_layers=())
    model = hh.HappyHorse(config).init_weights(seed=0)
    hh.accelerate(model, hh.FastConfig(backend="reference"))
    hh.save_packed(model, tmp_path / "packed")
    save_file({"text": torch.randn(1, 3, config.text_in_channels)}, tmp_path / "prompt.safetensors")
    made = {name: node() for name, node in nodes.NODE_CLASS_MAPPINGS.items()}
    (loaded,) = made["HappyHorseFastLoad"].load(str(tmp_path / "packed"), nodes.nodes.PACKED, "bf16")
    (text,) = made["HappyHorseFastText"].load(str(tmp_path / "prompt.safetensors"))
    assert host.unloaded == 1
    size = hh.ClipTokens(T=2, H=4, W=4, audio=5)
    monkeypatch.setattr(hh, "tokens_for", lambda *_: size)
    clip = ("256p", "16:9", 5, 24)
    video, audio = made["HappyHorseFastSample"].sample(loaded, text, *clip, 2, 5.0, 7)
    assert video["samples"].shape == (1, 48, 2, 4, 4) and audio["samples"].shape == (1, 5, 64)
    assert host.progress == [(1, 2, "picture"), (2, 2, "picture")]
    assert host.previews == [("JPEG", (1, 48, 2, 4, 4))] * 2
    noise = torch.Generator().manual_seed(7)
    start = torch.randn(1, 48, 2, 4, 4, generator=noise), torch.randn(1, 5, 64, generator=noise)
    wanted, _ = hh.sample(loaded, *start, text, steps=2, noise=noise, progress=False)
    assert torch.equal(video["samples"], wanted * 2 + 1)
    host.progress.clear()
    host.cancel_after = 1
    with pytest.raises(Interrupted):
        made["HappyHorseFastSample"].sample(loaded, text, *clip, 5, 5.0, 7)
    assert len(host.progress) == 1
