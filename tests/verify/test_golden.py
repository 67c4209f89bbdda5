"""The eager model against outputs recorded from the public implementation."""

from __future__ import annotations

import pytest
import torch

from happyhorse_fast import golden
from happyhorse_fast.eager import sequence
from happyhorse_fast.eager.rotary import rotary_phases

FORWARD = [name for name in golden.names() if not name.startswith("sr_")]
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def test_every_branch_is_recorded() -> None:
    assert set(FORWARD) == {
        "dense_v2_bf16",
        "dense_v2_fp32",
        "local_d128_bf16",
        "local_d128_fp32",
        "local_v1_fp32",
        "postnorm_v2_fp32",
    }


@pytest.mark.parametrize("name", FORWARD)
def test_sequence_matches_bit_for_bit(name: str) -> None:
    case = golden.load_case(name)
    t = case.tensors
    video, audio, text = t["in.video"], t["in.audio"], t["in.text"]
    clip = sequence.check_inputs(case.config, video, audio, text, torch.device("cpu"))
    coords = sequence.coordinates(clip, case.config.coords_style)
    assert torch.equal(sequence.pack_tokens(video, audio, text), t["tokens"])
    assert torch.equal(sequence.modality_of_tokens(clip), t["modality"])
    assert torch.equal(coords, t["coords"])
    phases = rotary_phases(coords, case.model().adapter.rope.bands)
    assert relative_l2(phases, t["rope"]) <= 1e-5
    ranges = torch.tensor(sequence.local_ranges(clip, case.config.frame_receptive_field))
    assert torch.equal(ranges[:, :2], t["local.q_ranges"].long())
    assert torch.equal(ranges[:, 2:], t["local.k_ranges"].long())


@pytest.mark.parametrize("name", FORWARD)
def test_layers_and_velocities(name: str) -> None:
    case = golden.load_case(name)
    t = case.tensors
    errors: dict[str, float] = {}

    def compare_layer(layer: int, hidden: torch.Tensor) -> None:
        errors[f"layer {layer}"] = relative_l2(hidden, t[f"layer.{layer}.out"])

    with torch.no_grad():
        video, audio = case.model()(t["in.video"], t["in.audio"], t["in.text"], on_layer=compare_layer)
    errors |= {"video": relative_l2(video, t["out.video"]), "audio": relative_l2(audio, t["out.audio"])}
    assert len(errors) == case.config.num_layers + 2
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= BUDGET[case.compute_dtype], f"measured {errors[worst]:.2e} at {worst}; all: {errors}"
