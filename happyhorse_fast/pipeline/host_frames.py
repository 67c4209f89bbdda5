"""Decoded frames on their way to the host: a window's bytes leave while the next window is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from happyhorse_fast.pipeline.turbo import to_uint8


class VideoDecoder(Protocol):
    """What :class:`~happyhorse_fast.pipeline.TurboDecoder` and ``WanCodec`` have in common."""

    def windows(self, latents: torch.Tensor, tiles: int = 1) -> Iterator[torch.Tensor]:
        """[1, 48, T, H, W] -> items [1, 3, frames, 16 H, 16 W], about -1 to 1."""


def host_frames(decoder: VideoDecoder, latents: torch.Tensor, tiles: int = 1) -> Iterator[torch.Tensor]:
    """The frames of a clip, window by window, as bytes on the host.

    On a GPU a window is copied to pinned memory by a stream of its own while the next one is decoded; a caller that
    works between two windows works beside the GPU too. On the device there are then one window's bytes beside the
    window that is decoded: 175 MB at 1080p.

    Args:
        decoder: Of the latents.
        latents: [1, 48, T, H, W], a floating-point dtype, on the decoder's device.
        tiles: As the decoder's ``windows`` takes it.

    Returns:
        An iterator; each item is a tensor of its own, [frames, 16 H, 16 W, 3] uint8 on the host, to be kept as long
        as needed.

    Raises:
        TypeError: As the decoder's ``windows``, before any work.
        ValueError: Likewise.
    """
    return _host_frames(decoder.windows(latents, tiles))


def _host_frames(windows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    before: _Leaving | None = None
    for window in windows:  # the work of this one is queued before that of the last is waited for
        leaving = _Leaving(window)
        del window
        if before is not None:
            yield before.arrived()
        before = leaving
    if before is not None:
        yield before.arrived()


class _Leaving:
    """Frames whose copy to the host was started."""

    def __init__(self, window: torch.Tensor) -> None:
        self._device_bytes: torch.Tensor | None = to_uint8(window)[0].permute(1, 2, 3, 0).contiguous()
        self._event: torch.cuda.Event | None = None
        if not window.is_cuda:
            self._host_bytes = self._device_bytes.cpu()
            return
        self._host_bytes = torch.empty(self._device_bytes.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        stream = _copy_stream(window.device)
        stream.wait_stream(torch.cuda.current_stream(window.device))
        with torch.cuda.stream(stream):
            self._host_bytes.copy_(self._device_bytes, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def arrived(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        self._device_bytes = None  # only now: the copy read it
        return self._host_bytes


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
