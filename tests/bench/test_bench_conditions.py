"""Clock and power while something is timed: of its span alone, from NVML."""

from __future__ import annotations

import importlib.machinery
import sys
import time
import types

import pytest
import torch

from bench.measure.conditions import Monitor

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
UUID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def nvml(monkeypatch):
    """A GPU under load, at 1410 MHz and momentarily 701.5 W, by planted bindings of NVML."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid=UUID))
    nvml = types.ModuleType("pynvml")
    nvml.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.NVML_FI_DEV_POWER_INSTANT, nvml.NVML_SUCCESS = 186, 0
    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda name: name
    nvml.field = types.SimpleNamespace(nvmlReturn=0, value=types.SimpleNamespace(uiVal=701_500))
    nvml.nvmlDeviceGetFieldValues = lambda handle, fields: (
        [nvml.field] if handle == f"GPU-{UUID}" and fields == [186] else []
    )
    nvml.nvmlDeviceGetPowerUsage = lambda _: 640_000
    nvml.clock = 1410
    nvml.nvmlDeviceGetClockInfo = lambda _, which: {1: nvml.clock, 2: 2619}[which]
    nvml.nvmlDeviceGetTemperature = lambda *_: 66
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 4
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def sampled(monitor, seconds=0.3):
    began = time.monotonic()
    time.sleep(seconds)
    return monitor.during(began, time.monotonic())


def test_the_state_of_a_span_is_that_of_the_chip_under_load(nvml):
    nvml.clock = 1980
    with Monitor(GPU) as monitor:
        cool = sampled(monitor)
        nvml.clock = 1410
        found = sampled(monitor)
        nvml.field.nvmlReturn = 3  # this card does not tell momentary power: the average over a second is what there is
        average = sampled(monitor)
        began = monitor.samples[0][0]
        assert monitor.during(began - 9, began - 1) == {}, "nothing is known of another span"
    assert cool["sm_mhz"] == 1980.0 and (found["sm_mhz"], found["power_w"]) == (1410.0, 701.5)
    assert found["conditions"]["after"] == {
        "sm_mhz": 1410.0,
        "memory_mhz": 2619.0,
        "power_w": 701.5,
        "temperature_c": 66.0,
        "throttle": "0x0000000000000004",
    }
    assert average["conditions"]["after"]["power_w"] == 640.0
    ended = len(monitor.samples)
    time.sleep(0.2)
    assert len(monitor.samples) <= ended + 1, "nobody samples outside"


def test_what_is_not_known_is_said(nvml, monkeypatch, capsys):
    with Monitor(CPU) as monitor:
        assert sampled(monitor, 0.1) == {}

    def absent():
        raise nvml.NVMLError("driver not loaded")

    monkeypatch.setattr(nvml, "nvmlInit", absent)
    with Monitor(GPU) as monitor:
        assert sampled(monitor, 0.1) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Monitor(GPU) as monitor:
        assert sampled(monitor, 0.1) == {}
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "NVML does not answer: driver not loaded",
        "nvidia-ml-py is not installed",
    ]
