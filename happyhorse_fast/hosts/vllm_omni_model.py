"""HappyHorse as a model of vLLM-Omni: `Pipeline` behind what it asks of a diffusion pipeline.

The plugin of `hosts.vllm_omni` registers it; a folder of parts names it in its model_index.json (docs/HOSTS.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from happyhorse_fast.pipeline.image import open_image
from happyhorse_fast.pipeline.pipeline import Pipeline
from happyhorse_fast.pipeline.request import FPS, Request
from happyhorse_fast.pipeline.sound import PLAYED_RATE
from happyhorse_fast.tokens import ASPECTS, SECONDS, SIDES, tokens_for

OPTIONS = "happyhorse_fast"
"""Key of the configuration's ``additional_config`` whose value has arguments of :meth:`Pipeline.from_pretrained`."""
_LEFT_OUT = {
    "quantization_config": "precision",
    "enable_cpu_offload": "placement",
    "enable_layerwise_offload": "placement",
    "enable_distributed_layerwise_offload": "placement",
    "diffusion_offload_config": "placement",
    "lora_path": None,
}
"""Settings of vLLM-Omni for the modules of a model, which are not there to it -> this package's own for the same."""
_MODELS_OWN = (
    "num_inference_steps",
    "guidance_scale",
    "sigmas",
    "timesteps",
    "latents",
    "audio_latents",
    "lora_request",
)
"""Of a request's sampling parameters, those that would change the clip and are not for a request to say."""
_SIZES = {tokens_for(resolution, aspect).pixels: (resolution, aspect) for resolution in SIDES for aspect in ASPECTS}
"""(height, width) -> resolution and aspect."""


class HappyHorseFastPipeline(nn.Module):
    """A :class:`Pipeline` of one worker, for one request at a time; its parts load at the first request.

    Args:
        od_config: vLLM-Omni's ``OmniDiffusionConfig``; ``model`` is the folder of parts.

    Raises:
        FileNotFoundError, CheckpointError: As for :meth:`Pipeline.from_pretrained`.
        ValueError: Likewise; or the configuration asks for several GPUs, or for what it has to ask this package for.
    """

    support_image_input: ClassVar[bool] = True
    support_audio_output: ClassVar[bool] = True
    audio_sample_rate: ClassVar[int] = PLAYED_RATE
    supports_request_cancellation: ClassVar[bool] = True
    dummy_run_num_frames: ClassVar[int] = 0
    """No run to warm up: the shortest clip has 3 seconds."""

    def __init__(self, *, od_config: Any) -> None:
        super().__init__()
        for name, ours in _LEFT_OUT.items():
            if getattr(od_config, name, None):
                instead = f"; additional_config={{{OPTIONS!r}: {{{ours!r}: ...}}}} is for that" if ours else ""
                raise ValueError(f"{name} must be left out, got {getattr(od_config, name)!r}{instead}")
        if od_config.cache_backend not in (None, "none"):
            raise ValueError(f"cache_backend must be left out: every step is computed; got {od_config.cache_backend!r}")
        if od_config.parallel_config.world_size != 1:
            raise ValueError(f"HappyHorse runs on one GPU here, got {od_config.parallel_config.world_size}")
        self.device = torch.get_default_device()  # the worker's, in whose context a model is made
        options = od_config.additional_config.get(OPTIONS, {})
        self.pipe = Pipeline.from_pretrained(od_config.model, device=self.device, **options)
        # One file, whose path a failed run tells and the next one overwrites: a server does not fill a disk.
        self._kept = tempfile.TemporaryDirectory(prefix="happyhorse-fast.")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing: a part loads when a request needs it.

        Args:
            weights: None, as there are no ``weights_sources``.
        """
        del weights
        return set()

    def forward(self, req: Any) -> Any:
        """Make the clip of a request.

        Args:
            req: A ``DiffusionRequestBatch`` of one request, read by :func:`settings_of`.

        Returns:
            A ``DiffusionOutput`` with video [n, H, W, 3] uint8 and audio [m, 2] float32, as NumPy arrays.

        Raises:
            OmniClientError: The request is for what HappyHorse does not make.
            DiffusionRequestAbortedError: It was cancelled, which ends it after the step that is running.
        """
        from vllm_omni.diffusion.cancellation import check_request_cancellation
        from vllm_omni.diffusion.data import DiffusionOutput
        from vllm_omni.errors import OmniClientError

        try:
            if req.num_reqs != 1:
                raise ValueError(f"a batch must have one request, got {req.num_reqs}")
            settings, image = settings_of(req.prompts[0], req.sampling_params)
            image = None if image is None else open_image(image)
            Request(**settings, image=image is not None)
        except (TypeError, ValueError) as error:
            raise OmniClientError(str(error)) from error
        clip = self.pipe(
            **settings,
            image=image,
            callback=lambda info: check_request_cancellation(),
            progress=False,
            latents=Path(self._kept.name) / "clip.latents.safetensors",
            overwrite=True,
        )
        assert clip.frames is not None  # no file was asked for
        return DiffusionOutput(
            output={
                "payload": {"video": clip.frames.numpy(), "audio": clip.samples.T.numpy()},
                "metadata": {"video": {"fps": clip.fps}, "audio": {"sample_rate": clip.sample_rate}},
            },
            stage_durations={cost.stage: cost.seconds for cost in clip.stages},
            peak_memory_mb=(clip.peak_bytes or 0) / 2**20,
        )


def settings_of(prompt: Any, sampling: Any) -> tuple[dict[str, Any], Any]:
    """Settings of a :class:`Request`, and the first picture or None.

    Args:
        prompt: Text, or a mapping with ``prompt``, ``negative_prompt`` and ``multi_modal_data``: ``image``.
        sampling: ``OmniDiffusionSamplingParams``, of which are read: ``height`` and ``width``, ``num_frames``, ``fps``,
            ``seed``, and of ``extra_args`` ``resolution``, ``aspect_ratio``, ``duration`` in seconds, ``stages``,
            ``first`` and ``noise``. What is left out is as for :class:`Pipeline`.

    Raises:
        TypeError, ValueError: Something is asked for that HappyHorse does not make; not all of it is found here.
    """
    fields: Any = {"prompt": prompt} if isinstance(prompt, str) else prompt
    if not isinstance(fields, Mapping) or "prompt" not in fields:
        raise TypeError(f"prompt must be text, or a mapping with one; got {type(prompt).__name__}")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if fields.get(name) is not None:
            raise ValueError(f"{name} must be left out: the prompt is encoded here")
    given = dict(fields.get("multi_modal_data") or {})
    image = given.pop("image", None)
    if isinstance(image, list | tuple):
        if len(image) != 1:
            raise ValueError(f"image must be one picture, the first of the clip; got {len(image)}")
        image = image[0]
    if given:
        raise ValueError(f"multi_modal_data must be an image, got {', '.join(sorted(given))} as well")
    if sampling.num_outputs_per_prompt != 1:
        raise ValueError(f"num_outputs_per_prompt must be 1, got {sampling.num_outputs_per_prompt}")
    for name in _MODELS_OWN:
        if getattr(sampling, name) is not None and (name != "guidance_scale" or sampling.guidance_scale_provided):
            raise ValueError(f"{name} must be left out: the model has its own")
    if sampling.seed is None:
        raise ValueError("seed must be given rather than a generator")
    if sampling.resolved_frame_rate not in (None, FPS):
        raise ValueError(f"fps must be {FPS}, got {sampling.resolved_frame_rate:g}")
    extra = sampling.extra_args
    settings = {"prompt": fields["prompt"], "seed": sampling.seed, **_size_of(sampling), **_seconds_of(sampling)}
    settings |= {name: extra[name] for name in ("stages", "first", "noise") if name in extra}
    if fields.get("negative_prompt"):
        settings["negative_prompt"] = fields["negative_prompt"]
    return settings, image


def _size_of(sampling: Any) -> dict[str, str]:
    """Resolution and aspect, as far as they are given."""
    names = {"resolution": "resolution", "aspect": "aspect_ratio"}
    asked = {ours: sampling.extra_args[name] for ours, name in names.items() if name in sampling.extra_args}
    size = (sampling.height, sampling.width)
    if size == (None, None):
        return asked
    if size not in _SIZES:
        allowed = ", ".join(f"{width}x{height}" for height, width in _SIZES)
        raise ValueError(f"width x height must be one of {allowed}; got {size[1]}x{size[0]}")
    found = dict(zip(names, _SIZES[size], strict=True))
    if found != {**found, **asked}:
        raise ValueError(
            f"{size[1]}x{size[0]} is {' at '.join(found.values())}, got {' at '.join(asked.values())} beside it"
        )
    return found


def _seconds_of(sampling: Any) -> dict[str, Any]:
    """Length, where it is given: 1 frame is what vLLM-Omni says where nobody said anything."""
    if "duration" in sampling.extra_args:
        return {"seconds": sampling.extra_args["duration"]}
    if sampling.num_frames in (None, 1):
        return {}
    for seconds in SECONDS:
        if sampling.num_frames in (FPS * seconds, Request(prompt="a clip", seconds=seconds).frames):
            return {"seconds": seconds}
    raise ValueError(
        f"num_frames must be {FPS} for each of {SECONDS[0]} to {SECONDS[-1]} seconds, got {sampling.num_frames}"
    )
