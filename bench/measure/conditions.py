"""The GPU's state while something is timed: clock, power, temperature and why the clock is held back.

A :class:`Monitor` samples it all along, through NVML where pynvml is installed, else through nvidia-smi in a process
beside; what was timed asks it for the samples of its own span.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from bench.results import Json

FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
    "clocks_throttle_reasons.active": "throttle",
}
"""Fields of nvidia-smi, and their names here."""
# Since Ampere power.draw is an average over a second; the momentary one, and the throttle reasons' newer name, are not
# known to every driver.
_FORMS: tuple[dict[str, str], ...] = (
    {"power.draw": "power.draw.instant", "clocks_throttle_reasons.active": "clocks_event_reasons.active"},
    {"power.draw": "power.draw.instant"},
    {"clocks_throttle_reasons.active": "clocks_event_reasons.active"},
    {},
)
TOOL = "nvidia-smi"
PERIOD_MS = 50
"""Between two samples: 20 in the shortest span."""
ANSWER_SECONDS = 2.0
Sample = tuple[float, Json]
"""(on ``time.monotonic``'s clock, the state by the names of :data:`FIELDS`)."""


class Monitor:
    """Samples of a GPU's state while inside; none on a CPU, or where neither NVML nor nvidia-smi answers.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[Sample] = []
        self._ended = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Monitor:
        if self.device.type == "cuda":
            name = _name(self.device)
            read = _nvml(name)
            if read is not None:
                threading.Thread(target=self._sample, args=(read,), daemon=True).start()
            elif shutil.which(TOOL) is not None:
                self._start(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

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
        medians = {
            name: statistics.median(values)
            for name in ("sm_mhz", "power_w")
            if (values := [state[name] for state in found if isinstance(state.get(name), float)])
        }
        return medians | {"conditions": {"before": found[0], "after": found[-1]}}

    def _sample(self, read: Callable[[], Json]) -> None:
        while not self._ended.wait(PERIOD_MS / 1e3):
            self.samples.append((time.monotonic(), read()))

    def _start(self, name: str) -> None:
        """Start nvidia-smi with the newest fields that it answers to."""
        for form in _FORMS:
            query = ",".join(form.get(field, field) for field in FIELDS)
            command = [TOOL, f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
            except (OSError, subprocess.SubprocessError):
                continue
            self.samples.append((time.monotonic(), _state(done.stdout)))
            self._process = subprocess.Popen(
                [*command, f"--loop-ms={PERIOD_MS}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()
            return

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.samples.append((time.monotonic(), _state(line)))


def _name(device: torch.device) -> str:
    """Name a device for NVML and nvidia-smi, by UUID: CUDA_VISIBLE_DEVICES changes torch's numbers alone."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device.index or 0) if uuid is None else f"GPU-{uuid}"


def _state(line: str) -> Json:
    """One line of nvidia-smi's."""
    state: Json = {}
    for name, value in zip(FIELDS.values(), line.split(","), strict=False):
        try:
            state[name] = float(value)
        except ValueError:  # a mask, or what this card does not tell
            state[name] = value.strip()
    return state


def _nvml(name: str) -> Callable[[], Json] | None:
    """Reads the state through NVML; None where pynvml is not installed or does not answer."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        by_uuid = name.startswith("GPU-")
        handle = nvml.nvmlDeviceGetHandleByUUID(name) if by_uuid else nvml.nvmlDeviceGetHandleByIndex(int(name))
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

        read()
    except nvml.NVMLError:
        return None
    return read
