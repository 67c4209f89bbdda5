"""Checks of the samplers' arguments, made before the first step; each message says what came and what is allowed."""

from __future__ import annotations

import math

import torch

from happyhorse_fast.arguments import real_number, require_finite, require_tensor


def require_positive(name: str, value: object) -> float:
    """A finite number above 0.

    Raises:
        TypeError: Not a number.
        ValueError: 0, negative, NaN or infinite.
    """
    number = _require_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and more than 0, got {value!r}")
    return number


def require_fraction(name: str, value: object) -> float:
    """A number from 0 to 1.

    Raises:
        TypeError: Not a number.
        ValueError: Outside 0..1, or NaN.
    """
    number = _require_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return number


def require_callback(callback: object) -> None:
    """Raise a TypeError where ``callback`` can be neither called nor left out."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable with a StepInfo, or None; got {type(callback).__name__}")


def prepare_image(image: object, video: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """The first latent frame's image, checked and in the latents' dtype.

    Args:
        image: [1, C, 1, H, W] latent of the image, or None.
        video: [1, C, T, H, W], the shape of the latent it goes into.
        device: Of the latent.
        dtype: Of the latent.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Wrong rank, size or device.
        NonFiniteError: NaN or Inf in it.
    """
    if image is None:
        return None
    value = require_tensor("image", image, (1, video[1], 1, video[3], video[4]), device=device)
    require_finite("image", value)
    return value.to(dtype)


def _require_number(name: str, value: object) -> float:
    number = real_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return number
