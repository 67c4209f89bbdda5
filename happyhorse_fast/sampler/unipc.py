"""UniPC on a rectified flow: diffusers' own scheduler, set up as the published checkpoints were sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.sampler.levels import unshifted_levels

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler


@ambient.makes_tensors
def unipc_scheduler(steps: int, shift: float) -> UniPCMultistepScheduler:
    """A scheduler for one latent over one run; it keeps that latent's history.

    Its steps are the published code's bit for bit. Without the explicit levels diffusers would choose other ones, with
    results 0.2 to 0.4 % off.

    Args:
        steps: Number of steps.
        shift: Of the noise levels.

    Returns:
        Scheduler with ``sigmas`` [steps + 1] and ``timesteps`` [steps], both on the CPU, wherever the latents are.

    Raises:
        ImportError: diffusers is not installed or does not import; says what to install.
    """
    optional.require("diffusers", "a UniPC step (guidance, super_resolve)")
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=unshifted_levels(steps))
    # By index: beyond about 200 steps the first timesteps, which are whole numbers, repeat and name no single step.
    scheduler.set_begin_index(0)
    return scheduler


@ambient.independent
def unipc_step(
    scheduler: UniPCMultistepScheduler, velocity: torch.Tensor, index: int, latent: torch.Tensor
) -> torch.Tensor:
    """A latent one noise level lower; its products are in the latent's dtype, whatever torch's settings are."""
    (lower,) = scheduler.step(velocity, scheduler.timesteps[index], latent, return_dict=False)
    return lower


def move_history(scheduler: UniPCMultistepScheduler, device: torch.device) -> None:
    """Put the latents that a scheduler keeps between steps, three of them, on a device."""
    kept = scheduler.model_outputs
    scheduler.model_outputs = [None if output is None else output.to(device) for output in kept]
    if scheduler.last_sample is not None:
        scheduler.last_sample = scheduler.last_sample.to(device)
