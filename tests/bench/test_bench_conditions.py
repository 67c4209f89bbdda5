"""Clock and power while something is timed: of its span alone, from NVML or a (planted) nvidia-smi."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import time
import types

import pytest
import torch

from bench.measure import conditions
from bench.measure.conditions import Monitor

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
UUID = "11111111-2222-3333-4444-555555555555"
# Of a driver that knows neither momentary power nor the throttle reasons' newer name.
SMI = """#!/bin/sh
case "$*" in *instant*|*event_reasons*) exit 6;; esac
case "$*" in *"-i GPU-{uuid}"*) ;; *) exit 7;; esac
echo "1980, 2619, 120.50, 41, 0x0000000000000001"
case "$*" in *loop-ms=50*) ;; *) exit 0;; esac
echo $$ > {pid}
while true; do sleep 0.02; echo "1395, 2619, 699.10, 66, 0x0000000000000004"; done
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that nvidia-smi alone knows."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid=UUID))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    tool, pid = tmp_path / conditions.TOOL, tmp_path / "pid"
    tool.write_text(SMI.format(uuid=UUID, pid=pid))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return pid


def sampled(monitor, seconds=0.3):
    began = time.monotonic()
    time.sleep(seconds)
    return monitor.during(began, time.monotonic())


def test_the_state_of_a_span_is_that_of_the_chip_under_load(gpu):
    with Monitor(GPU) as monitor:
        deadline = time.monotonic() + 10
        while len(monitor.samples) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        found = sampled(monitor)
        began = monitor.samples[0][0]
        assert monitor.during(began - 9, began - 1) == {}, "nothing is known of another span"
    assert (found["sm_mhz"], found["power_w"]) == (1395.0, 699.1)
    assert found["conditions"]["after"] == {
        "sm_mhz": 1395.0,
        "memory_mhz": 2619.0,
        "power_w": 699.1,
        "temperature_c": 66.0,
        "throttle": "0x0000000000000004",
    }
    assert monitor.samples[0][1]["sm_mhz"] == 1980.0
    with pytest.raises(ProcessLookupError):
        os.kill(int(gpu.read_text()), 0)


def test_nvml_is_read_where_it_is_installed(gpu, monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    nvml.NVMLError = RuntimeError
    nvml.NVML_FI_DEV_POWER_INSTANT, nvml.NVML_SUCCESS = 186, 0
    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda name: name
    field = types.SimpleNamespace(nvmlReturn=0, value=types.SimpleNamespace(uiVal=701_500))
    nvml.nvmlDeviceGetFieldValues = lambda handle, fields: (
        [field] if handle == f"GPU-{UUID}" and fields == [186] else []
    )
    nvml.nvmlDeviceGetPowerUsage = lambda _: 640_000
    nvml.nvmlDeviceGetClockInfo = lambda _, which: {1: 1410, 2: 2619}[which]
    nvml.nvmlDeviceGetTemperature = lambda *_: 66
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 4
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Monitor(GPU) as monitor:
        found = sampled(monitor)
        field.nvmlReturn = 3  # this card does not tell momentary power: the average over a second is what there is
        average = sampled(monitor)
    assert (found["sm_mhz"], found["power_w"]) == (1410.0, 701.5)
    assert average["conditions"]["after"]["power_w"] == 640.0
    assert not gpu.exists(), "nvidia-smi was not needed"

    def absent():
        raise nvml.NVMLError("driver not loaded")

    monkeypatch.setattr(nvml, "nvmlInit", absent)
    with Monitor(GPU) as monitor:
        assert sampled(monitor, 0.5)["sm_mhz"] == 1395.0, "nvidia-smi's"


def test_nothing_is_known_of_a_cpu_or_without_a_tool(gpu, monkeypatch):
    with Monitor(CPU) as monitor:
        assert sampled(monitor, 0.1) == {}
    monkeypatch.setenv("PATH", "/nonexistent")
    with Monitor(GPU) as monitor:
        assert sampled(monitor, 0.1) == {}
