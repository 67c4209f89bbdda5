"""Which parts stay on the device: by the plan on a GPU, one at a time on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logged import logs

from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.pipeline import placing
from happyhorse_fast.pipeline.layout import read_layout
from happyhorse_fast.pipeline.parts import Parts
from happyhorse_fast.pipeline.placing import place, predicted, work_of
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.pipeline.residency import Residency
from happyhorse_fast.pipeline.stages import stages_of

REQUEST = Request(prompt="x", seconds=3, resolution="540p", image=True)


def parts(folder: Path, device: str) -> Parts:
    where = torch.device(device)
    return Parts(read_layout(folder, {}), where, FastConfig(precision="int8"), "turbo", Residency(where, on_host=False))


def test_on_a_cpu_nothing_is_planned(tiny: Path) -> None:
    there = parts(tiny, "cpu")
    assert place(there, REQUEST, "auto") == placing.Placing((), "sequential")
    assert place(there, REQUEST, "resident") == placing.Placing(tuple(there.names(REQUEST).values()), "resident")


@pytest.mark.slow
def test_on_a_gpu_its_budget_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = parts(tiny, "cuda")
    budget = [80 << 30]
    monkeypatch.setattr(placing, "budget_of", lambda device: budget[0])
    large = place(there, REQUEST, "auto")
    assert large.placement == "resident" and large.plan is not None and large.plan.fits
    assert set(large.kept) == set(there.names(REQUEST).values())
    assert place(there, REQUEST, "sequential").kept == ()
    budget[0] = large.plan.peak_bytes - 1
    smaller = place(there, REQUEST, "auto")
    assert smaller.placement == "mixed" and {"distill", "540p_sr", "video_decoder"} <= set(smaller.kept)
    budget[0] = 1 << 30
    with logs(r"this clip is planned to take .* GiB, cuda has 1\.0; `happyhorse-fast plan"):
        smallest = place(there, REQUEST, "auto")
    assert smallest.layers_on_device == 1 and smallest.tiles > 1


def test_the_plan_is_of_the_run_that_is_asked_for(tiny: Path) -> None:
    work = work_of(parts(tiny, "cuda"), REQUEST)
    assert (work.precision, work.attention, work.decoder, work.image, work.sound) == (
        "int8",
        None,
        "turbo",
        True,
        False,
    )
    assert work.first.coords_style == "v2" and work.second is not None and work.second.coords_style == "v1"
    assert (work.first_clip, work.last_clip) == ((19, 16, 28, 76), (19, 32, 56, 76))
    assert work_of(parts(tiny, "cuda"), Request(prompt="x", stages=1, first="base")).second is None


def test_every_stage_has_a_prediction(tiny: Path) -> None:
    there = parts(tiny, "cpu")
    for request in (REQUEST, Request(prompt="x", stages=1, sound=True, first="base")):
        found = predicted(there, request, stages_of(request))
        assert list(found) == stages_of(request)
        assert all(one.load > 0 and one.compute > 0 for one in found.values())
    found = predicted(there, REQUEST, stages_of(REQUEST))
    there.residency.seconds_to_bring = {"distill": 0.0, "540p_sr": 2.0}.get  # type: ignore[method-assign]
    again = predicted(there, REQUEST, stages_of(REQUEST))
    assert (again["denoise"].load, again["super-resolve"].load, again["text"]) == (0, 2, found["text"])
    assert next(iter(predicted(there, REQUEST, stages_of(REQUEST, "denoise")))) == "super-resolve"
