"""Which parts are on the device, which wait on the host, and that they come back as they were."""

from __future__ import annotations

import time
import weakref
from pathlib import Path

import pytest
import torch
from logged import logs
from torch import nn

from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.pipeline import host_weights, residency
from happyhorse_fast.pipeline.host_weights import HostWeights, available_bytes, host_bytes
from happyhorse_fast.pipeline.residency import Residency

CPU = torch.device("cpu")
MIB = 2**20


class Loads:
    """Loads parts of one MiB, and counts."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def use(self, parts: Residency, name: str, *, seconds: float = 0.0, how: object = None) -> None:
        def load() -> nn.Module:
            self.names.append(name)
            time.sleep(seconds)
            return nn.Linear(512, 512, bias=False)

        with parts.using(name, load, how):
            assert name in parts.held


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the host has available, MiB."""
    mib = [100]
    monkeypatch.setattr(residency, "available_bytes", lambda: mib[0] * MIB)
    return mib


def test_parts_that_are_kept_stay_and_others_are_loaded_again() -> None:
    loads, parts = Loads(), Residency(CPU, on_host=False)
    parts.keep_only(["a"])
    for name in ("a", "b", "a", "b"):
        loads.use(parts, name)
        assert parts.held == ("a",)
    assert loads.names == ["a", "b", "b"]
    parts.keep_only(["b"])
    assert parts.held == ()


def test_others_wait_on_the_host(room: list[int]) -> None:
    loads, parts = Loads(), Residency(CPU, on_host=True)
    for name in ("a", "b", "a", "b"):
        loads.use(parts, name)
        assert parts.held == ()
    assert loads.names == ["a", "b"]
    assert parts.seconds_to_bring("a") == MIB / residency.HOST_SPEED
    assert parts.seconds_to_bring("c") is None
    loads.use(parts, "a", how=3)
    assert loads.names == ["a", "b", "a"], "it was loaded in another way"


def test_what_was_kept_waits_once_it_is_not(room: list[int]) -> None:
    loads, parts = Loads(), Residency(CPU, on_host=True)
    parts.keep_only(["a"])
    loads.use(parts, "a")
    assert parts.seconds_to_bring("a") == 0
    parts.keep_only([])
    assert parts.held == () and parts.seconds_to_bring("a") == MIB / residency.HOST_SPEED


def test_half_of_the_host_is_taken_by_what_takes_longest_to_load(room: list[int]) -> None:
    loads, parts = Loads(), Residency(CPU, on_host=True)
    room[0] = 2
    loads.use(parts, "quick")
    room[0] = 1  # one of two is taken
    loads.use(parts, "slow", seconds=0.05)
    loads.use(parts, "quick")
    loads.use(parts, "slow")
    assert loads.names == ["quick", "slow", "quick"]
    room[0] = 0
    again = Residency(CPU, on_host=True)
    for _ in range(2):
        loads.use(again, "a")
    assert loads.names[3:] == ["a", "a"]


@pytest.mark.parametrize("known", [True, False])
def test_a_part_that_fails_leaves_the_device_and_is_not_copied(room: list[int], known: bool) -> None:
    loads, parts = Loads(), Residency(CPU, on_host=True)
    if known:
        loads.use(parts, "a")
    with pytest.raises(KeyboardInterrupt), parts.using("a", lambda: nn.Linear(2, 2)):
        raise KeyboardInterrupt
    assert parts.held == ()
    assert (parts.seconds_to_bring("a") is not None) == known


def test_a_copy_that_fails_costs_a_warning(room: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("no memory to pin")

    monkeypatch.setattr(residency, "HostWeights", full)
    loads, parts = Loads(), Residency(torch.device("meta"), on_host=True)  # a device that is not the host
    with logs("a cannot wait on the host, it will be loaded again: no memory to pin"):
        loads.use(parts, "a")
    assert parts.held == () and parts.seconds_to_bring("a") is None


def odd() -> nn.Module:
    """Tensors of all kinds: strides, dtypes, a buffer, a plain attribute, an empty one and one on "meta"."""
    made = nn.Sequential(nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), nn.Linear(4, 4, device="meta"))
    made.register_buffer("codes", torch.randn(7, 3).to(torch.float8_e4m3fn))
    made.register_buffer("none", torch.empty(0))
    made[0].plain = torch.arange(11).bool()  # type: ignore[assignment]
    return made


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(host_weights._tensors(module))


def test_weights_leave_the_device_and_come_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "BLOCK_BYTES", 64)  # so that tensors lie across blocks
    module = odd()
    before = {key: (value.detach().clone(), value.stride()) for key, value in tensors(module).items()}
    gone = [weakref.ref(value) for value in tensors(module).values()]
    with torch.device("meta"):  # a default device is not where the copy goes
        host = HostWeights(module, pinned=False)
    for _ in range(2):
        host.leave()
        assert tensors(module) == {} and all(ref() is None for ref in gone)
        host.come(CPU)
        after = tensors(module)
        assert after.keys() == before.keys()
        for key, (value, stride) in before.items():
            assert after[key].dtype == value.dtype and after[key].stride() == stride
            assert torch.equal(host_weights._flat(after[key]), host_weights._flat(value)), key
    assert isinstance(module[0].weight, nn.Parameter) and "codes" in dict(module.named_buffers())  # type: ignore[index]


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_an_accelerated_model_gives_the_same_bits(tiny: Path, precision: str) -> None:
    from test_tiny import inputs, noted

    import happyhorse_fast as hh

    config = noted(tiny, "540p_sr")
    fast = FastConfig(backend="reference", precision=precision, originals="drop")  # type: ignore[arg-type]
    model = hh.load(tiny / "540p_sr", config=config, progress=False, fast=fast)
    given = inputs(config)
    before = model(*given)
    host = HostWeights(model, pinned=False)
    host.leave()
    assert model.fast.clips == {} and all(value.is_meta for value in model.state_dict().values())  # type: ignore[union-attr]
    host.come(CPU)
    assert all(torch.equal(one, other) for one, other in zip(model(*given), before, strict=True))


def test_pinned_memory_is_counted_as_torch_rounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "BLOCK_BYTES", 2048)
    module = nn.Linear(25, 25, bias=False)
    assert host_bytes(module, pinned=False) == 2500
    assert host_bytes(module, pinned=True) == 2048 + 512
    assert host_bytes(nn.Module(), pinned=True) == 0


def test_what_is_available_is_the_machines_or_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "meminfo"
    monkeypatch.setattr(host_weights, "_MEMORY", memory)
    monkeypatch.setattr(host_weights, "_GROUP", tmp_path)
    assert available_bytes() == 0
    memory.write_text("MemTotal:  4000 kB\nMemAvailable:  3000 kB\n")
    assert available_bytes() == 3000 * 1024
    for name, content in (("max", "2000000"), ("current", "1500000"), ("stat", "anon 1000\ninactive_file 400000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_bytes() == 900_000
    (tmp_path / "memory.max").write_text("max")
    assert available_bytes() == 3000 * 1024
