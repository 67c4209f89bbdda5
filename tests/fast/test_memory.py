"""Peak memory under fake tensors: counted right, against arithmetic and against real tensors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import Attention, HappyHorse
from happyhorse_fast.eager.sizes import parameters
from happyhorse_fast.fast import memory
from happyhorse_fast.fast.accelerate import empty_accelerated
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK
from happyhorse_fast.fast.memory import StorageMeter, one_layer_per_kind, peak_by_kind, peak_memory
from happyhorse_fast.ops.runtime.dispatch import choose
from happyhorse_fast.tokens import ClipTokens, tokens_for

torch.set_num_threads(1)

TINY = ModelConfig.preset("tiny")
CLIP = ClipTokens(T=5, H=12, W=16, audio=17)
FULL = ModelConfig.preset("happyhorse-1.0-15b")
KIB = 1024


def tiny(config: ModelConfig = TINY) -> HappyHorse:
    return HappyHorse(config, device="meta")


def test_views_count_once_and_released_storages_count_no_more() -> None:
    meter = StorageMeter()
    with meter:
        a = torch.empty(KIB, dtype=torch.uint8)
        views = [a.view(32, 32), a[10:], a.view(32, 32).t()]
        assert meter.live_bytes == KIB
        del a
        assert meter.live_bytes == KIB
        b = torch.empty(2 * KIB, dtype=torch.uint8)
        assert meter.live_bytes == 3 * KIB
        del views
        assert meter.live_bytes == 2 * KIB
        b.add_(1)
    assert (meter.live_bytes, meter.peak_bytes) == (2 * KIB, 3 * KIB)
    assert meter.operation == "aten.empty.memory_format -> uint8 [2048]"


def test_a_peak_between_two_tensors_is_seen() -> None:
    meter = StorageMeter()
    with meter:
        x = torch.empty(KIB)
        y = (x + 1) * 2
    assert meter.peak_bytes == 3 * 4 * KIB  # x, x + 1 and the product at once
    assert meter.live_bytes == 2 * 4 * KIB
    del x, y
    assert meter.live_bytes == 0


def test_weights_are_counted_and_nothing_is_allocated() -> None:
    peak = peak_memory(HappyHorse(FULL, device="meta"), tokens_for("256p", seconds=3), call=lambda model, *inputs: None)
    bands = 4 * (FULL.head_dim // 8)
    assert peak.weight_bytes == parameters(FULL)["bytes"] + bands
    assert peak.peak_bytes > 30e9  # on a machine that need not have as much


def test_a_fake_run_peaks_where_a_real_one_does() -> None:
    model = HappyHorse(TINY, torch.float32).init_weights(0)
    fake = peak_memory(model, CLIP, 8)
    inputs = torch.randn(1, 48, 5, 12, 16), torch.randn(1, 17, 64), torch.randn(1, 8, 96)
    meter = StorageMeter()
    meter.register((*model.parameters(), *model.buffers()), "weights")
    meter.register(inputs, "inputs")
    with torch.no_grad(), meter:
        model(*inputs)
    # Fake tensors skip the checks for NaN, which are small.
    assert meter.peak_bytes == pytest.approx(fake.peak_bytes, rel=0.01)
    assert next(model.parameters()).device.type == "cpu"
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in model.parameters())


class Planted(nn.Module):
    """A model that makes one tensor of [tokens, width] on its way."""

    def __init__(self, model: HappyHorse, width: int) -> None:
        super().__init__()
        self.model, self.config, self.width = model, model.config, width

    def forward(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> object:
        big = torch.empty(CLIP.total(8), self.width, device=video.device)
        out = self.model(video, audio, text)
        del big
        return out


def test_a_planted_tensor_raises_the_peak() -> None:
    plain, planted = peak_memory(tiny(), CLIP, 8), peak_memory(Planted(tiny(), 27304), CLIP, 8)
    size = CLIP.total(8) * 27304 * 4
    assert planted.peak_bytes - plain.peak_bytes == size


class Recorder(StorageMeter):
    """Notes the operation and the shape of every tensor as well."""

    made: ClassVar[set[tuple[str, tuple[int, ...]]]] = set()

    def _count(self, tensor: torch.Tensor, name: str) -> None:
        self.made.add((name, tuple(tensor.shape)))
        super()._count(tensor, name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, tuple[int, ...]]]:
    monkeypatch.setattr(Recorder, "made", found := set())
    monkeypatch.setattr(memory, "StorageMeter", Recorder)
    return found


def test_no_square_tensor_in_fused_attention(made: set[tuple[str, tuple[int, ...]]]) -> None:
    clip = tokens_for("256p", seconds=3)
    peak_memory(HappyHorse(one_layer_per_kind(FULL, clip), device="meta"), clip, 640)
    total = clip.total()
    shapes = {shape for _, shape in made}
    assert (total, FULL.hidden_size) in shapes
    assert not [shape for shape in shapes if shape.count(total) > 1]


@pytest.mark.quick(1)
@pytest.mark.parametrize("resolution", ["1080p", "256p"])
def test_one_layer_of_each_kind_gives_the_same_peak(resolution: str) -> None:
    config = TINY.replace(num_layers=9, post_norm_layers=(3,), local_attn_layers=(0, 2, 4, 6, 8), mm_layers=(0, 7, 8))
    clip = tokens_for(resolution, "1:1", seconds=3) if resolution == "256p" else CLIP
    assert one_layer_per_kind(config, clip).num_layers == 6
    assert peak_by_kind(config, clip, tiny, text=8) == peak_memory(tiny(config), clip, 8).peak_bytes


def test_the_full_model_at_1080p() -> None:
    clip = tokens_for("1080p")
    peak = peak_by_kind(FULL, clip, lambda config: HappyHorse(config, device="meta")) / 2**30
    # Eager makes the MLP and QKV in chunks of 8192 rows: no [64001, 27304] float32, which alone is 6.5 GiB.
    assert 34 < peak < 40, f"measured {peak:.2f} GiB"


@pytest.mark.slow
def test_the_full_model_at_1080p_layer_by_layer() -> None:
    clip = tokens_for("1080p")
    peak = peak_memory(HappyHorse(FULL, device="meta"), clip)
    assert peak.peak_bytes == peak_by_kind(FULL, clip, lambda config: HappyHorse(config, device="meta"))


def test_fake_tensors_go_through_a_gpus_attention(made: set[tuple[str, tuple[int, ...]]]) -> None:
    with FakeTensorMode(), memory._AsOnCuda(), memory.StorageMeter():
        q, k = (torch.empty(9, heads, 16, dtype=torch.bfloat16) for heads in (5, 1))
        out = Attention.attend(q, k, k, [(0, 9, 0, 9)])
    assert out.shape == q.shape
    names = {name for name, _ in made}
    assert "aten._scaled_dot_product_flash_attention.default" in names and "aten.bmm.default" not in names


@pytest.mark.parametrize("sparsity", [TopK(0.5), Tiles(1, 1, 1)])
def test_a_sparse_models_masks_are_counted(sparsity: TopK | Tiles) -> None:
    def peak(policy: TopK | Tiles | None) -> int:
        choices = choose("reference", "bf16", torch.device("cpu"))
        return peak_memory(empty_accelerated(TINY, FastConfig(sparsity=policy), choices), CLIP, 8).peak_bytes

    blocks = -(-CLIP.total(8) // 128)
    assert peak(sparsity) - peak(None) >= 4 * blocks**2, "a table of blocks, or a map"


def test_a_model_without_a_config_is_named() -> None:
    with pytest.raises(TypeError, match="model must have a ModelConfig as its attribute config, got NoneType"):
        peak_memory(nn.Linear(2, 2), CLIP)
