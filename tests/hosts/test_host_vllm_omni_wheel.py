"""The plugins, the backend and the model with vLLM-Omni's own wheel of the tested version; vLLM itself is stubs."""

import ast
import re

import pytest
from host_wheels import ROOT, folder, run

from happyhorse_fast.hosts import vllm_omni
from happyhorse_fast.hosts.versions import TESTED
from happyhorse_fast.pipeline.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.slow
SUPPORT = ROOT / "tests" / "support"
STUBS = (SUPPORT / "vllm_stubs.py", TESTED["vllm-omni"])


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    return run("vllm-omni", *STUBS, SUPPORT / "vllm_omni_attention.py", cwd=tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(where / "tiny")
    (index,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / "HOSTS.md").read_text(), re.S | re.M)
    (where / "tiny" / "model_index.json").write_text(index)
    (where / "tmp").mkdir()
    script = SUPPORT / "vllm_omni_model_run.py"
    found = run("vllm-omni", *STUBS, script, where / "tiny", cwd=where, TMPDIR=str(where / "tmp"))
    return found | {"left behind": [path.name for path in (where / "tmp").glob("happyhorse*")]}


def test_its_loader_finds_the_plugin_and_its_registry_gives_the_subclasses(attention):
    assert attention["chosen"] == ["FLASH_ATTN"]
    for name in ("FLASH_ATTN", "TORCH_SDPA", "CUDNN_ATTN"):
        path = f"{vllm_omni.__name__}.{vllm_omni.CLASS}{name}"
        assert attention[name] == {"is a": True, "name": True, "path": path}
    assert attention["a model's own"], "its layer refuses an implementation that is no subclass of the chosen one"
    assert attention["after"] == []


def test_a_call_is_as_near_to_float64_as_its_own_and_another_runs_as_before(attention):
    ours, own = attention["errors"]
    assert 0 < ours <= 1.5 * own
    assert attention["float32"] and attention["joint query"]
    assert attention["layer"] == ours and attention["taken"] == 2, "vLLM-Omni's own layer makes the second call"
    assert attention["lines"] == [
        "vLLM-Omni: attention by happyhorse_fast, backend reference",
        "vLLM-Omni runs attention itself: query is float32, not bfloat16",
        "vLLM-Omni runs attention itself: metadata with joint_query",
    ], "what vLLM's own logger shows"
    assert attention["left"] == {"query is float32, not bfloat16": 1, "metadata with joint_query": 1}


def test_what_keeps_a_call_from_being_taken_has_its_names(attention):
    assert {"attn_mask", "joint_query", "full_attn_spans", "packed_padding", "extra"} <= set(attention["metadata"])
    source = (folder("vllm-omni") / "vllm_omni" / "diffusion" / "attention" / "backends" / "flash_attn.py").read_text()
    said = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert {*vllm_omni.MEANT, "kv_cache_dtype"} <= said


def test_the_model_is_registered_with_what_a_server_asks_of_it(model):
    assert model["class"] == "happyhorse_fast.hosts.vllm_omni_model.HappyHorseFastPipeline"
    assert model["name"] == vllm_omni.MODEL == model["class"].rpartition(".")[2]
    assert model["names before plugins load"] == [vllm_omni.MODEL, True], "a server asks before"
    assert model["images"] == [True, 1] and model["inputs"] == [True, False]
    assert (model["output"], model["sound"], model["frames to warm up"]) == ("video", True, 0)
    assert (model["batches"], model["cancels"]) == (False, True)
    assert (model["decoder"], model["training"]) == ("wan", False)


def test_its_runner_makes_the_clip_of_the_pipeline_bit_for_bit(model):
    assert model["clip"] == {
        "kind": "video",
        "frames": True,
        "sound": True,
        "rates": [25, 44_100],
        "stages": True,
        "finite": True,
    }


def test_a_cancelled_request_ends_after_a_step_and_the_next_one_runs(model):
    assert model["cancelled"] == [True, 3] and model["after it"]
    assert model["left behind"] == []


def test_what_it_does_not_make_is_a_client_error(model):
    messages = {
        "size": "width x height must be one of 1920x1088, ",
        "two sizes": "448x256 is 256p at 16:9, got 540p beside it",
        "frames": "num_frames must be 25 for each of 3 to 15 seconds, got 81",
        "duration": "seconds must be a whole number from 3 to 15; got 3.5",
        "fps": "fps must be 25, got 24",
        "steps": "num_inference_steps must be left out: the model has its own",
        "guidance": "guidance_scale must be left out: the model has its own",
        "LoRA": "lora_request must be left out: the model has its own",
        "embedding": "prompt_embeds must be left out: the prompt is encoded here",
        "outputs": "num_outputs_per_prompt must be 1, got 2",
        "sound": "multi_modal_data must be an image, got audio as well",
        "images": "image must be one picture, the first of the clip; got 2",
        "negative": 'negative_prompt must come with first="base"',
        "prompt": "prompt must say something",
        "tokens": "prompt must be text, or a mapping with one; got dict",
        "generator": "seed must be given rather than a generator",
    }
    assert model["refused"].keys() == messages.keys()
    for name, (status, said) in model["refused"].items():
        assert status == 400 and said.startswith(messages[name]), name


def test_what_the_configuration_has_to_ask_this_package_for_is_refused(model):
    assert model["not loaded"] == {
        "GPUs": "HappyHorse runs on one GPU here, got 2",
        "offload": "enable_cpu_offload must be left out, got True; "
        "additional_config={'happyhorse_fast': {'placement': ...}} is for that",
        "cache": "cache_backend must be left out: every step is computed; got 'tea_cache'",
    }
