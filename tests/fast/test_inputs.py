"""What the model is called with: a clear error, or the right answer, for the eager model and the fast one alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from happyhorse_fast.arguments import NonFiniteError
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import rotary_phases
from happyhorse_fast.eager.sequence import Clip, coordinates
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.config import FastConfig

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=64,
    head_dim=32,
    num_heads_q=2,
    num_heads_kv=1,
    text_in_channels=8,
    mm_layers=(0,),
    gelu7_layers=(0,),
    local_attn_layers=(1,),
    frame_receptive_field=1,
)
EAGER = HappyHorse(CONFIG).init_weights(0)
FAST = accelerate(HappyHorse(CONFIG).init_weights(0), FastConfig(backend="reference"))


def clip(video: Any = (1, 48, 3, 4, 6), audio: Any = (1, 5, 64), text: Any = (1, 3, 8)) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw) for shape in (video, audio, text)]


def with_nan(index: int) -> list[torch.Tensor]:
    tensors = clip()
    tensors[index].view(-1)[3] = (torch.nan, torch.inf, -torch.inf)[index]
    return tensors


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (clip(video=(48, 3, 4, 6)), ValueError, r"video must have 5 dimensions \[1, 48, T, H, W\], got 4: \[48, 3, 4, 6\]"),
    (clip(video=(2, 48, 3, 4, 6)), ValueError, r"video must be of size 1 in dimension 0 .* got \[2, 48, 3, 4, 6\]"),
    (clip(video=(1, 16, 3, 4, 6)), ValueError, r"video must be of size 48 in dimension 1 .* got \[1, 16, 3, 4, 6\]"),
    (clip(video=(1, 48, 0, 4, 6)), ValueError, r"video must have at least 1 element in dimension 2 \(T\)"),
    (clip(video=(1, 48, 3, 5, 6)), ValueError, r"video must have an even H .* got \[1, 48, 3, 5, 6\]"),
    (clip(video=(1, 48, 3, 4, 7)), ValueError, r"video must have an even W .* got \[1, 48, 3, 4, 7\]"),
    (clip(audio=(1, 0, 64)), ValueError, r"audio must have at least 1 element in dimension 1 \(A\)"),
    (clip(audio=(5, 64)), ValueError, r"audio must have 3 dimensions \[1, A, 64\]"),
    (clip(audio=(1, 5, 32)), ValueError, r"audio must be of size 64 in dimension 2"),
    (clip(text=(1, 0, 8)), ValueError, r"text must have at least 1 element in dimension 1 \(L\)"),
    (clip(text=(1, 3, 9)), ValueError, r"text must be of size 8 in dimension 2"),
    ([*clip()[:2], torch.ones(1, 3, 8, dtype=torch.long)], TypeError, "text must be float16, .* got torch.int64"),
    ([*clip()[:2], [[1.0]]], TypeError, r"text must be a tensor of shape \[1, L, 8\], got list"),
    ([*clip()[:2], torch.ones(1, 3, 8, device="meta")], ValueError, "text must be on device cpu, .* got meta"),
    (with_nan(0), NonFiniteError, "video must be finite, got 1 NaN or Inf among 3456 elements"),
    (with_nan(1), NonFiniteError, "audio must be finite"),
    (with_nan(2), NonFiniteError, "text must be finite"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED)
@pytest.mark.parametrize("model", [EAGER, FAST], ids=["eager", "fast"])
def test_refused(model: torch.nn.Module, arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says), torch.no_grad():
        model(*arguments)


@examples(20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_any_shape_has_velocities_of_its_shape(frames: int, rows: int, columns: int, audio: int, text: int) -> None:
    inputs = clip((1, 48, frames, 2 * rows, 2 * columns), (1, audio, 64), (1, text, 8))
    with torch.no_grad():
        outputs = EAGER(*inputs)
        fast = FAST(*inputs)
    for value, other, given_ in zip(outputs, fast, inputs, strict=False):
        assert value.shape == other.shape == given_.shape
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert float((other - value).norm() / value.norm()) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_input(dtype: torch.dtype) -> None:
    inputs = [x.bfloat16().float() for x in clip()]
    with torch.no_grad():
        exact, given_ = EAGER(*inputs), EAGER(*(x.to(dtype) for x in inputs))
    assert all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(given_, exact, strict=True))


def test_one_token_has_a_place_in_v2_and_none_in_v1() -> None:
    single = Clip(3, 2, 3, audio=1, text=1)
    phases = rotary_phases(coordinates(single, "v2"), torch.ones(4))
    sin, cos = phases[-1].chunk(2)
    # One text token sits at t = -1 with scale 1; rows and columns do not turn.
    assert torch.allclose(sin[:4], torch.tensor(-1.0).sin())
    assert torch.equal(sin[4:], torch.zeros(8))
    assert torch.allclose(cos[:4], torch.tensor(-1.0).cos())
    with pytest.raises(ValueError, match='audio must have at least 2 tokens where coords_style is "v1"'):
        coordinates(Clip(3, 2, 3, audio=1, text=2), "v1")
    with pytest.raises(ValueError, match='text must have at least 2 tokens where coords_style is "v1"'):
        coordinates(Clip(3, 2, 3, audio=4, text=1), "v1")
    assert len(coordinates(Clip(1, 2, 3, audio=1, text=2), "v1")) == 9
    v1 = HappyHorse(CONFIG.replace(coords_style="v1"))
    with pytest.raises(ValueError, match="text must have at least 2 tokens"):
        v1(*clip(text=(1, 1, 8)))


def test_a_grid_without_a_scale_is_an_error() -> None:
    coords = coordinates(Clip(1, 1, 1, 1, 1), "v2")
    coords[0, 7] = 3
    with pytest.raises(ValueError, match="grid of size 1"):
        rotary_phases(coords, torch.ones(4))


def test_a_model_is_made_of_a_configuration() -> None:
    with pytest.raises(TypeError, match="config must be a ModelConfig, got dict"):
        HappyHorse({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compute_dtype must be one of .* got torch.float16"):
        HappyHorse(CONFIG, torch.float16)


def test_the_reference_holds_no_matrix_of_all_tokens() -> None:
    from happyhorse_fast.eager import attention
    from happyhorse_fast.fast.memory import StorageMeter

    q, k = torch.randn(6000, 2, 32), torch.randn(6000, 1, 32)
    budget = attention.SCORE_BYTES
    try:
        attention.SCORE_BYTES = 1 << 20
        with StorageMeter() as meter:
            attention.block_sparse_attention(q, k, k, [(0, 6000, 0, 6000)])
    finally:
        attention.SCORE_BYTES = budget
    assert meter.peak_bytes < 6000 * 6000 * 4 / 8, f"measured {meter.peak_bytes} bytes"
