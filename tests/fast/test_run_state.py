"""The denoising step belongs to the run: of several threads, tasks and models, each has its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_models import clip, fast_model, packed, same, several_blocks

from happyhorse_fast import at_step
from happyhorse_fast.fast.config import Tiles, TopK
from happyhorse_fast.sampler import sample

SPARSE = {"sparsity": TopK(0.1), "exact_first_steps": 2}


def noise(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(name.rsplit(".", 1)[1])))


def run(model: Any, inputs: tuple[torch.Tensor, ...], steps: int = 3, **options: Any) -> Any:
    return sample(model, *inputs, steps=steps, noise=noise, progress=False, **options)


class Wrapped:
    """A denoiser around a model, as the samplers allow."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device, self.stream_dtype = model, model.config, model.device, model.stream_dtype

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs)


def test_the_samplers_step_reaches_a_model_through_a_wrapper() -> None:
    inputs = several_blocks()
    model, exact, always = fast_model(**SPARSE), fast_model(), fast_model(sparsity=TopK(0.1))
    result = run(model, inputs)
    assert same(run(Wrapped(model), inputs), result)
    assert not same(run(exact, inputs), result)
    assert not same(run(always, inputs), result)
    assert same(run(exact, inputs, steps=2), run(model, inputs, steps=2)), "two steps are the two exact ones"


def test_a_second_thread_that_finishes_a_run_moves_nothing() -> None:
    inputs = several_blocks()
    model = fast_model(**SPARSE)
    alone = run(model, inputs)

    def other(info: Any) -> None:
        thread = threading.Thread(target=run, args=(model, inputs, 1))
        thread.start()
        thread.join()

    class Interrupted(Wrapped):
        def __call__(self, *given: torch.Tensor) -> Any:
            other(None)  # inside a step of the first run
            return super().__call__(*given)

    assert same(run(Interrupted(model), inputs, callback=other), alone)


def test_eight_threads_of_one_model_give_the_bits_of_one() -> None:
    # Each thread alternates between two of three shapes, so that states are also dropped while others run.
    shapes = [clip(2, 64, audio) for audio in (13, 14, 15)]
    model = fast_model(layers=1, **SPARSE)
    alone = [run(model, inputs, 3) for inputs in shapes]
    start = threading.Barrier(8)

    def work(i: int) -> list[bool]:
        start.wait()
        return [same(run(model, shapes[k % 3], 3), alone[k % 3]) for k in (i, i + 1)]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(results) for results in pool.map(work, range(8)))
    assert len(model.fast.clips) <= 2


def velocities(inputs: Any, public: bool) -> tuple[Any, Callable[[Any], Any]]:
    given = packed(inputs) if public else inputs

    def call(model: Any) -> Any:
        with torch.no_grad():
            return model(*given)

    return given, call


@pytest.mark.parametrize("public", [False, True])
def test_a_loop_of_ones_own(public: bool) -> None:
    _, call = velocities(several_blocks(), public)
    model = fast_model(public, sparsity=TopK(0.1), exact_first_steps=2, exact_last_steps=1)
    exact, always = call(fast_model(public)), call(fast_model(public, sparsity=TopK(0.1)))
    assert not same(exact, always)
    for step in range(5):
        with at_step(step, 5):
            assert same(call(model), always if step in (2, 3) else exact), step
    with at_step(2, 5), at_step(0, 5):
        assert same(call(model), exact), "the inner holds"


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("rule", [{"exact_first_steps": 2}, {"exact_last_steps": 1}])
def test_a_step_that_is_not_known_is_an_error_at_the_first_call(public: bool, rule: dict[str, int]) -> None:
    _, call = velocities(clip(), public)
    model = fast_model(public, sparsity=TopK(0.1), **rule)
    with pytest.raises(
        ValueError, match=r"exact_first_steps=.*need to know the denoising step.*at_step\(step, steps\)"
    ):
        call(model)
    with at_step(0, 8), ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="a thread of its own"):
        pool.submit(call, model).result()
    with at_step(0, 8), pytest.raises(KeyError):
        raise KeyError
    with pytest.raises(ValueError, match="need to know"):
        call(model)  # an error inside at_step ends it


@pytest.mark.parametrize("options", [{}, {"sparsity": TopK(0.1)}, {"exact_first_steps": 2}])
def test_without_a_rule_no_step_is_asked_for(options: dict[str, Any]) -> None:
    _, call = velocities(clip(), False)
    assert len(call(fast_model(**options))) == 2


def test_tasks_that_take_turns_within_a_step() -> None:
    _, call = velocities(several_blocks(), False)
    model = fast_model(**SPARSE)
    exact, always = call(fast_model()), call(fast_model(sparsity=TopK(0.1)))

    async def task(step: int) -> Any:
        with at_step(step, 8):
            await asyncio.sleep(0.01)  # the other task enters its step
            result = call(model)
            await asyncio.sleep(0.01)
            return result, await asyncio.to_thread(call, model)

    async def both() -> Any:
        return await asyncio.gather(task(0), task(5))

    first, second = asyncio.run(both())
    assert all(same(result, exact) for result in first)
    assert all(same(result, always) for result in second)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, 8), ValueError, "step must be from 0 to 7, got 8"),
        ((-1, 8), ValueError, "step must be from 0 to 7, got -1"),
        ((0.5, 8), TypeError, "step must be an integer, from 0 to 7; got 0.5 of type float"),
        ((0, "8"), TypeError, "steps must be an integer, at least 1; got '8'"),
    ],
)
def test_places_that_are_none(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), at_step(*arguments):
        pass


@pytest.mark.parametrize("sparsity", [TopK(0.1), pytest.param(Tiles(0, 9, 9), marks=pytest.mark.slow)])
def test_a_run_compiles_one_graph_of_exact_steps_and_one_of_the_others(sparsity: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    inputs = several_blocks()
    model = fast_model(sparsity=sparsity, exact_first_steps=2, exact_last_steps=1)
    expected = run(model, inputs, 5)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    assert same(run(compiled, inputs, 5), expected)
    assert counter.frame_count == 2
    with torch.no_grad(), at_step(3, 5):
        assert same(compiled(*inputs), model(*inputs))
    assert counter.frame_count == 2
    torch._dynamo.reset()
    with pytest.raises(Exception, match="need to know the denoising step"):
        compiled(*inputs)
