"""Models of any size with seeded random weights, made on the device: nothing is read, packed or copied."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from bench.inputs import CODE_SPREAD
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.fast.accelerate import empty_accelerated
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.layer import FastLayer
from happyhorse_fast.ops.qkv.packing import static_qk_scale
from happyhorse_fast.ops.quantize import FORMATS
from happyhorse_fast.ops.runtime.checks import compute_capability
from happyhorse_fast.ops.runtime.cuda.launch import cuda_obstacle
from happyhorse_fast.ops.runtime.dispatch import Choice, choose, cuda_ops
from happyhorse_fast.ops.runtime.obstacles import BackendError

Backend = Literal["auto", "triton", "hopper", "cuda", "reference"]


def random_eager(config: ModelConfig, device: torch.device, seed: int) -> HappyHorse:
    """The eager model in bf16."""
    return HappyHorse(config, device=device).init_weights(seed)


def random_fast(config: ModelConfig, fast: FastConfig, backend: Backend, device: torch.device, seed: int) -> HappyHorse:
    """An accelerated model whose packed weights are drawn, padding included, which costs what the real ones cost.

    Args:
        config: Of the model.
        fast: How it is accelerated.
        backend: ``"cuda"`` where it has a kernel and Triton elsewhere, both without a self-check; ``"hopper"`` is
            Triton, whose table :func:`bench.hopper.running` changes; the rest as it says.
        device: Where it is made.
        seed: Of the weights.

    Raises:
        BackendError: ``fast`` is strict and an op has no kernel that may run.
    """
    fast = dataclasses.replace(
        fast.on(compute_capability(device)), backend="triton" if backend == "cuda" or backend == "hopper" else backend
    )
    strict = fast.strict and backend == "auto"
    choices = choose(fast.backend, fast.precision, device, attention=fast.attention, strict=strict)
    if backend == "cuda":
        obstacle = cuda_obstacle(device)
        if obstacle is not None:
            raise BackendError(f"backend 'cuda' cannot run: {obstacle}")
        choices |= {op: Choice(op, "cuda", "asked for") for op in cuda_ops(fast.precision, fast.attention)}
    model = empty_accelerated(config, fast, choices).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        model.init_weights(seed)
        model.adapter.rope.bands.copy_(frequency_bands(config.head_dim, device))
        for layer in model.block.layers:
            assert isinstance(layer, FastLayer)
            _fill(layer, generator)
    return model


def _fill(layer: FastLayer, generator: torch.Generator) -> None:
    buffers = dict(layer.named_buffers())
    for name, value in buffers.items():
        if name.endswith("_weight"):
            inputs, spread = value.shape[-1], CODE_SPREAD.get(FORMATS.get(value.dtype, ""))
            if spread:
                drawn = torch.empty_like(value, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)
                value.copy_(drawn.clamp_(-4 * spread, 4 * spread))
                buffers[name.replace("_weight", "_scale")].fill_(inputs**-0.5 / spread)
            else:
                value.normal_(0.0, inputs**-0.5, generator=generator)
        elif name.endswith("_norm"):
            value.normal_(0.0, 0.2, generator=generator)
    layer.qk_scale.copy_(static_qk_scale(layer.qk_norm))
    layer.find_bound()
