"""The nodes. ComfyUI's own modules are imported by the methods that use them, so that the file reads without it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open

import happyhorse_fast as hh
from happyhorse_fast.hosts import comfyui, versions

BACKENDS = ["auto", "triton", "cuda", "reference"]
PACKED = "packed: as it was saved"
Types = dict[str, dict[str, tuple[Any, ...]]]


class Attention:
    """MODEL -> MODEL: attention of any model, where a call fits; the log says what ran, and what did not and why."""

    CATEGORY = "happyhorse_fast"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> Types:
        no = ("BOOLEAN", {"default": False})
        return {"required": {"model": ("MODEL",), "backend": (BACKENDS,), "float16": no, "strict": no}}

    def apply(self, model: Any, backend: str, float16: bool, strict: bool) -> tuple[Any]:
        """Clone the model with the override.

        Args:
            model: Stays as it is.
            backend: "auto" is the kernel that passed its self-check on this GPU.
            float16: Take calls in float16 too, as bf16: approximate. ComfyUI runs Wan in float16 unless it is started
                with --bf16-unet.
            strict: Stop at a call that does not fit.
        """
        from comfyui_version import __version__

        versions.tell("ComfyUI", __version__)
        return (comfyui.enable(model, backend=backend, float16=float16, strict=strict)[0],)


class Load:
    """A folder of packed or published weights -> HAPPYHORSE_MODEL."""

    CATEGORY = "happyhorse_fast"
    RETURN_TYPES = ("HAPPYHORSE_MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Types:
        presets = [PACKED, *hh.ModelConfig.preset_names()]
        precisions = ["bf16", "int8", "fp8"]
        return {"required": {"folder": ("STRING", {"default": ""}), "preset": (presets,), "precision": (precisions,)}}

    def load(self, folder: str, preset: str, precision: Any) -> tuple[Any]:
        """Load onto ComfyUI's device, from which its other models are taken first.

        Args:
            folder: Path of the weights.
            preset: Their configuration; packed weights have their own, and their own precision.
            precision: Of the products of published weights.
        """
        from comfy import model_management

        model_management.unload_all_models()
        device = model_management.get_torch_device()
        if preset == PACKED:
            return (hh.load(folder, device=device),)
        backend = "auto" if device.type == "cuda" else "reference"
        return (
            hh.load(folder, preset=preset, device=device, fast=hh.FastConfig(precision=precision, backend=backend)),
        )


class Text:
    """A safetensors file with ``text`` [1, L, 3584], the prompt's embedding -> HAPPYHORSE_TEXT."""

    CATEGORY = "happyhorse_fast"
    RETURN_TYPES = ("HAPPYHORSE_TEXT",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Types:
        return {"required": {"file": ("STRING", {"default": ""})}}

    def load(self, file: str) -> tuple[torch.Tensor]:
        with safe_open(file, "pt") as tensors:
            return (tensors.get_tensor("text"),)


class Sample:
    """HAPPYHORSE_MODEL, HAPPYHORSE_TEXT -> LATENT of the video, for the VAE of Wan 2.2; LATENT of the audio."""

    CATEGORY = "happyhorse_fast"
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("video", "audio")
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> Types:
        whole = {"model": ("HAPPYHORSE_MODEL",), "text": ("HAPPYHORSE_TEXT",)}
        clip = {
            "resolution": (["256p", "540p", "1080p"],),
            "aspect": (["16:9", "9:16", "1:1"],),
            "seconds": ("INT", {"default": 5, "min": 3, "max": 15}),
            "fps": ("INT", {"default": 24, "min": 24, "max": 25}),
        }
        run = {
            "steps": ("INT", {"default": 8, "min": 1, "max": 64}),
            "shift": ("FLOAT", {"default": 5.0, "min": 0.1, "max": 20.0}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
        }
        return {"required": whole | clip | run}

    def sample(
        self,
        model: Any,
        text: torch.Tensor,
        resolution: str,
        aspect: str,
        seconds: int,
        fps: int,
        steps: int,
        shift: float,
        seed: int,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Denoise a clip, with a step of ComfyUI's progress bar and a preview of the first frame after each.

        The button that cancels ends it after the step that is running.
        """
        from comfy.latent_formats import Wan22

        size = hh.tokens_for(resolution, aspect, seconds, fps)
        config, noise = model.config, torch.Generator().manual_seed(seed)
        channels = config.video_in_channels // 4
        video = torch.randn(1, channels, size.T, size.H, size.W, generator=noise).to(model.device)
        audio = torch.randn(1, size.audio, config.audio_in_channels, generator=noise).to(model.device)
        text = text.to(model.device)
        callback = _show(model.device, steps)
        video, audio = hh.sample(
            model, video, audio, text, steps=steps, shift=shift, noise=noise, callback=callback, progress=False
        )
        return {"samples": Wan22().process_out(video.cpu())}, {"samples": audio.cpu()}


def _show(device: torch.device, steps: int) -> Any:
    """A callback for every step: ComfyUI's progress bar, its preview, and its wish to cancel, which it raises."""
    import latent_preview
    from comfy import model_management
    from comfy.latent_formats import Wan22
    from comfy.utils import ProgressBar

    bar, previewer = ProgressBar(steps), latent_preview.get_previewer(device, Wan22())

    def show(info: Any) -> None:
        picture = previewer and previewer.decode_latent_to_preview_image("JPEG", info.video)
        bar.update_absolute(info.step, info.steps, picture)
        model_management.throw_exception_if_processing_interrupted()

    return show
