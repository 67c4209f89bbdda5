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
from happyhorse_fast.pipeline.progress import Prediction
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.pipeline.residency import Residency

REQUEST = Request(prompt="x", seconds=3, resolution="540p", image=True)


def parts(folder: Path, device: str) -> Parts:
    where = torch.device(device)
    return Parts(read_layout(folder, {}), where, FastConfig(precision="int8"), "turbo", Residency(where, on_host=False))


def test_on_a_cpu_nothing_is_planned(tiny: Path) -> None:
    there = parts(tiny, "cpu")
    for placement, wanted in (("auto", "sequential"), ("sequential", "sequential"), ("resident", "resident")):
        found = place(there, REQUEST, placement)  # type: ignore[arg-type]
        assert found.placement == wanted and found.budget_bytes is None
        assert found.kept == (tuple(REQUEST.parts.values()) if placement == "resident" else ())


@pytest.mark.slow
def test_on_a_gpu_its_budget_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = parts(tiny, "cuda")
    budget = [80 << 30]
    monkeypatch.setattr(placing, "budget_of", lambda device: budget[0])
    large = place(there, REQUEST, "auto")
    assert large.placement == "resident" and large.fits
    assert set(large.kept) == set(REQUEST.parts.values())
    assert place(there, REQUEST, "sequential").kept == ()
    budget[0] = large.peak_bytes - 1
    smaller = place(there, REQUEST, "auto")
    assert smaller.placement == "mixed" and {"distill", "540p_sr", "video_decoder"} <= set(smaller.kept)
    budget[0] = 1 << 30
    with logs(r"this clip is planned to take .* GiB, cuda has 1\.0; `happyhorse-fast plan"):
        smallest = place(there, REQUEST, "auto")
    assert smallest.layers_on_device == 1 and smallest.tiles > 1


def test_the_plan_is_of_the_run_that_is_asked_for(tiny: Path) -> None:
    work = work_of(parts(tiny, "cuda"), REQUEST)
    assert (work.precision, work.attention, work.decoder, work.request) == ("int8", None, "turbo", REQUEST)
    assert [config.coords_style for config in work.models] == ["v2", "v1"]


def test_every_stage_has_a_prediction(tiny: Path) -> None:
    there = parts(tiny, "cpu")

    def found(request: Request) -> dict[str, Prediction]:
        return predicted(there, place(there, request, "auto"), list(request.parts))

    for request in (REQUEST, Request(prompt="x", stages=1, sound=True, first="base")):
        every = found(request)
        assert list(every) == list(request.parts)
        assert all(one.load > 0 and one.compute > 0 for one in every.values())
    before = found(REQUEST)
    there.residency.seconds_to_bring = {"distill": 0.0, "540p_sr": 2.0}.get  # type: ignore[method-assign]
    again = found(REQUEST)
    assert (again["denoise"].load, again["super-resolve"].load, again["text"]) == (0, 2, before["text"])
