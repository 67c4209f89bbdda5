"""The GPU's state while something is timed: clock, power, temperature and why the clock is held back.

A :class:`Monitor` samples it all along, through NVML's Python bindings (nvidia-ml-py); what was timed asks it for the
samples of its own span.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.results import Json

PERIOD_SECONDS = 0.05
"""Between two samples: 20 in the shortest span."""


class Monitor:
    """Samples of a GPU's state while inside; none on a CPU, or where NVML does not answer, which it then says.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[tuple[float, Json]] = []  # on the clock of time.monotonic
        self._ended = threading.Event()

    def __enter__(self) -> Monitor:
        if self.device.type == "cuda":
            try:
                read = _reader(self.device)
                read()
            except Exception as error:  # of the bindings, a type of their own
                absent = isinstance(error, ImportError)
                why = "nvidia-ml-py is not installed" if absent else f"NVML does not answer: {error}"
                print(f"clock and power are not known: {why}", file=sys.stderr, flush=True)
            else:
                threading.Thread(target=self._sample, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def during(self, began: float, ended: float) -> Json:
        """Return what a result says of its span: ``sm_mhz`` and ``power_w``, medians, and ``conditions`` at its ends.

        Args:
            began: On ``time.monotonic``'s clock.
            ended: Likewise.

        Returns:
            Empty where there is no sample of the span.
        """
        found = [state for taken, state in list(self.samples) if began <= taken <= ended]
        if not found:
            return {}
        medians = {name: statistics.median(state[name] for state in found) for name in ("sm_mhz", "power_w")}
        return medians | {"conditions": {"before": found[0], "after": found[-1]}}

    def _sample(self, read: Callable[[], Json]) -> None:
        while not self._ended.wait(PERIOD_SECONDS):
            self.samples.append((time.monotonic(), read()))


def _reader(device: torch.device) -> Callable[[], Json]:
    """Reads a GPU's state."""
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    # By UUID: CUDA_VISIBLE_DEVICES changes torch's numbers alone.
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    instant = getattr(nvml, "NVML_FI_DEV_POWER_INSTANT", None)

    def power() -> float:
        if instant is not None:
            with contextlib.suppress(nvml.NVMLError):
                (value,) = nvml.nvmlDeviceGetFieldValues(handle, [instant])
                if value.nvmlReturn == nvml.NVML_SUCCESS:
                    return float(value.value.uiVal) / 1e3
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    def read() -> Json:
        return {
            "sm_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": power(),
            "temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "throttle": f"0x{nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle):016x}",
        }

    return read
