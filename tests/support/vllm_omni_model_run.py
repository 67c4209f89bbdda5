"""In a process of vLLM-Omni: its own configuration, loader, runner and formatter, with HappyHorse as the model."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from vllm_omni.diffusion import cancellation, diffusion_engine, io_support, output_formatter
from vllm_omni.diffusion.data import (
    DiffusionOutput,
    DiffusionParallelConfig,
    OmniDiffusionConfig,
    resolve_model_class_name,
)
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.registry import DiffusionModelRegistry
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.hf_utils import is_diffusion_model
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.platforms import current_omni_platform
from vllm_omni.plugins import load_omni_general_plugins

import happyhorse_fast as hh
from happyhorse_fast.hosts.vllm_omni import MODEL

folder = Path(sys.argv[1])
load_omni_general_plugins()
before = DiffusionModelRegistry._try_load_model_cls(MODEL)


def configured(**settings):
    config = OmniDiffusionConfig.from_kwargs(model=str(folder), **settings)
    config.enrich_config()
    return config


config = configured(additional_config={"happyhorse_fast": {"decoder": "wan"}})
found = {
    "class": f"{before.__module__}.{before.__qualname__}",
    "name": config.model_class_name,
    "names before plugins load": [resolve_model_class_name(str(folder)), is_diffusion_model(str(folder))],
    "images": [config.supports_multimodal_inputs, config.max_multimodal_image_inputs],
    "inputs": io_support.supports_multimodal_input(config),
    "output": io_support.get_diffusion_output_type(MODEL),
    "sound": io_support.supports_audio_output(MODEL),
    "frames to warm up": io_support.get_dummy_run_num_frames(MODEL, False),
    "batches": diffusion_engine.supports_request_batch(config),
    "cancels": diffusion_engine.supports_request_cancellation(config),
}


def loaded(config):
    loader = DiffusersPipelineLoader(types.SimpleNamespace(load_format="auto"), od_config=config)
    return loader.load_model(load_device="cpu", device=torch.device("cpu"))


model = loaded(config)
found["decoder"], found["training"] = model.pipe.parts.decoder, model.training

runner = object.__new__(DiffusionModelRunner)  # without what connects stages
vars(runner).update(vllm_config=None, od_config=config, device=torch.device("cpu"), pipeline=model)
vars(runner).update(kv_transfer_manager=None, cache_backend=None, prompt_embed_cache=None)
runner._maybe_recv_stage_payload = runner._maybe_send_stage_payload = lambda *_: None


def run(prompt, *, id="a", signal=None, extra=None, **sampling):
    short = {"duration": 3.0, "stages": 1, "noise": "cpu"}
    params = OmniDiffusionSamplingParams(**sampling, extra_args=short if extra is None else extra)
    request = OmniDiffusionRequest(prompt=prompt, sampling_params=params, request_id=id, cancellation_signal=signal)
    try:
        ran = runner._execute_request_list(
            [request],
            od_config=config,
            allow_single_output=True,
            require_request_batch_support=False,
            record_name="pipeline_forward",
            record_output_peak_memory=False,
        )
        return request, ran.runner_outputs[0].result
    except ValueError as error:
        return request, DiffusionOutput.from_exception(error)


size = {"height": 256, "width": 448}
picture = PIL.Image.fromarray(np.arange(300 * 300 * 3, dtype=np.uint32).reshape(300, 300, 3).astype(np.uint8))
prompt = {"prompt": "a pony", "multi_modal_data": {"image": picture}}
request, output = run(prompt, seed=7, fps=25, **size)
formatted = output_formatter.normalize_diffusion_postprocess_output(output.output)
(given,) = output_formatter.format_diffusion_outputs(
    request=request, od_config=config, diffusion_output=output, output_data=output.output, postprocess_output=formatted
)
pipe = hh.Pipeline.from_pretrained(folder, device="cpu", decoder="wan")
short = {"seconds": 3, "resolution": "256p", "stages": 1, "noise": "cpu"}
clip = pipe("a pony", image=picture, seed=7, progress=False, **short)
found["clip"] = {
    "kind": given.final_output_type,
    "frames": np.array_equal(given.images[0], clip.frames.numpy()),
    "sound": np.array_equal(given.multimodal_output["audio"], clip.samples.T.numpy()),
    "rates": [given.multimodal_output["fps"], given.multimodal_output["audio_sample_rate"]],
    "stages": list(output.stage_durations) == [cost.stage for cost in clip.stages],
    "finite": bool(np.isfinite(given.multimodal_output["audio"]).all()),
}

type(current_omni_platform).synchronize = staticmethod(lambda: None)  # no platform of its own is for a CPU
signals, checks = cancellation.RequestCancellationRegistry(), []
own = cancellation.check_request_cancellation


def check(**how):
    checks.append(1)
    if len(checks) == 3:
        signals.cancel(["b"])
    own(**how)


cancellation.check_request_cancellation = check
_, cancelled = run(prompt, id="b", signal=signals.create("b"), seed=7, **size)
signals.close()
cancellation.check_request_cancellation = own
_, again = run(prompt, seed=7, num_frames=75, extra={"stages": 1, "noise": "cpu"}, **size)
found["cancelled"] = [cancelled.aborted, len(checks)]
found["after it"] = np.array_equal(again.output["payload"]["video"], output.output["payload"]["video"])

refused = {
    "size": run("a pony", height=720, width=1280),
    "two sizes": run("a pony", extra={"resolution": "540p"}, **size),
    "frames": run("a pony", num_frames=81, extra={}),
    "duration": run("a pony", extra={"duration": 3.5}),
    "fps": run("a pony", fps=24),
    "steps": run("a pony", num_inference_steps=4),
    "guidance": run("a pony", guidance_scale=4.0),
    "LoRA": run("a pony", lora_request=object()),
    "embedding": run({"prompt": "a pony", "prompt_embeds": torch.zeros(1)}),
    "outputs": run("a pony", num_outputs_per_prompt=2),
    "sound": run({"prompt": "a pony", "multi_modal_data": {"audio": "a.wav"}}),
    "images": run({"prompt": "a pony", "multi_modal_data": {"image": [picture] * 2}}),
    "negative": run({"prompt": "a pony", "negative_prompt": "a cat"}),
    "prompt": run({"prompt": " "}),
    "tokens": run({"prompt_token_ids": [1]}),
    "generator": run("a pony", generator=torch.Generator()),
}
found["refused"] = {name: [output.error_status_code, output.error] for name, (_, output) in refused.items()}

settings = {
    "GPUs": {"parallel_config": DiffusionParallelConfig(ulysses_degree=2)},
    "offload": {"enable_cpu_offload": True},
    "cache": {"cache_backend": "tea_cache"},
}
found["not loaded"] = {}
for name, setting in settings.items():
    try:
        loaded(configured(**setting))
    except ValueError as error:
        found["not loaded"][name] = str(error)
print(json.dumps(found))
