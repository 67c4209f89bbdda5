"""From noise to latents: the distilled and the guided sampler, and the second, super-resolution stage."""

from happyhorse_fast.sampler.progress import StepInfo
from happyhorse_fast.sampler.sample import sample
from happyhorse_fast.sampler.super_resolve import super_resolve

__all__ = ["StepInfo", "sample", "super_resolve"]
