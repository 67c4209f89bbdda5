"""The sampler end to end: the 15B model with seeded random weights made on the device, per mode, mask and memory cap.

    python -m bench.sampler --results auto --minutes 5 --runs "15b/1080p/fast fp8/exact/whole" --seconds-per-run 60

A run times as many steps as its time allows and says how many: 8 of 8 are a clip as published, fewer an estimate, since
a chip that is warm is slower. The published two-stage path is two runs: 8 steps at 256p, and the second stage's 5 at
1080p. No run is started that could not end in time.
"""

from __future__ import annotations

import bench.bootstrap  # noqa: F401  isort: skip - first: maps the kernels

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench import LOST, began
from bench.cases import TINY, TINY_SIZE
from bench.hopper import attention_kernel, running
from bench.inputs import BOUNDED, RUNNING
from bench.measure.conditions import Monitor
from bench.measure.random_model import Backend, random_eager, random_fast
from bench.ops import arguments, open_results
from bench.report.tables import clip_table
from bench.results import RUN_NUMBERS, Json
from bench.sampler_runs import MODES, PUBLISHED_SECONDS, SECOND_STAGE, Run, chosen, runs
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import usable_bytes
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.ops.attention.score_bound import LIMIT
from happyhorse_fast.ops.runtime.formats import uses_e4m3
from happyhorse_fast.ops.runtime.obstacles import BackendError, lost
from happyhorse_fast.sampler.sample import sample
from happyhorse_fast.sampler.super_resolve import super_resolve
from happyhorse_fast.tokens import TEXT_TOKENS, ClipTokens, tokens_for
from happyhorse_fast.verify.op_times import OpTimes, random_inputs

FAILED, NOT_RUN = "failed", "not run"
SEED = 0


class Enough(Exception):
    """Ends a run whose time is up."""


class Bench:
    """Runs one after another on a device, keeping the model while it stays the same.

    Args:
        device: Where.
        tiny: A tiny model and clip in every run's place, through the reference: to try the code without a GPU.
        backend: Of fast models: ``"auto"``, ``"triton"``, ``"hopper"`` (Triton's kernels for it) or ``"cuda"``. Where a
            self-check forbids ``"auto"``, Triton runs nonetheless, and the run says that it is not verified.
        monitor: Samples the GPU's state.
    """

    def __init__(
        self, device: torch.device, tiny: bool = False, backend: Backend = "auto", monitor: Monitor | None = None
    ) -> None:
        if device == torch.device("cuda"):  # limiting a process's memory takes a device with an index
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.tiny, self.backend, self.monitor = device, tiny, backend, monitor
        self.lost: str | None = None
        self._unverified = ""
        self._model: HappyHorse | None = None
        self._made_for: tuple[Any, ...] = ()

    def run(self, run: Run, seconds: float | None = None) -> Json:
        """Time a run; running out of memory, a kernel that may not run, or what else goes wrong is a result.

        Afterwards ``lost`` says what took the GPU from this process, None where it works.
        """
        entry, note = self.named(run) | dict.fromkeys(RUN_NUMBERS), ""
        try:
            self._cap(run.cap_gb)
            with running(self.backend if run.fast else ""):
                # A model of this frame's would outlive what is forgotten below.
                entry |= self._measure(self._model_for(run), run, run.most_time if seconds is None else seconds)
        except torch.cuda.OutOfMemoryError as error:
            note = f"out of memory: {str(error).partition('. ')[0]}"
        except BackendError as error:
            note = f"{NOT_RUN}: {error}"
        except Exception as error:  # whatever a compiler or driver raises must not end the other runs
            note = f"{FAILED}: {type(error).__name__}: {error}"
        if note:
            self._forget()
            entry["note"] = note
        self.lost = lost(self.device)
        if self.lost is None:
            self._cap(None)
        return entry

    def named(self, run: Run) -> Json:
        """Fields of a result file that name a run."""
        return dataclasses.asdict(run) | ({"backend": self.backend} if run.fast else {})

    def _measure(self, model: HappyHorse, run: Run, seconds: float) -> Json:
        clip, text = self._clip(run.resolution, run.seconds), TINY_SIZE.text if self.tiny else TEXT_TOKENS
        inputs = random_inputs(model.config, clip, text, self.device)
        state: Any = model.fast if run.fast else None
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with torch.no_grad():
            model(*inputs)  # compiles, and makes what depends on the clip's shape
        began = time.monotonic()
        times, notes = self._sample(model, run, inputs, seconds)
        chip = self.monitor.during(began, time.monotonic()) if self.monitor else {}
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None
        if self.tiny:
            notes.append("a tiny model and clip in plain torch in this run's place")
        notes += [self._unverified] if run.fast and self._unverified else []
        if len(times) < run.steps:
            notes.append(f"{len(times)} of {run.steps} steps timed")
        each = statistics.median(times)
        # Of a capped run it would be the uncapped one's.
        counted = run.mode != "torch.compile" and run.cap_gb is None
        breakdown = None
        if counted:
            with torch.no_grad(), OpTimes(self.device) as spent:
                model(*inputs)
            breakdown = {name: round(taken, 5) for name, taken in spent.seconds().items()}
        return {
            **({"attention": attention_kernel(state, self.device), "softmax": softmax_of(model)} if run.fast else {}),
            "s_per_step": each,
            "total_s": sum(times) if len(times) == run.steps else each * run.steps,
            "peak_memory_gib": peak,
            "breakdown": breakdown,
            "note": "; ".join(notes),
            **chip,
        }

    def _sample(
        self, model: HappyHorse, run: Run, inputs: Sequence[torch.Tensor], seconds: float
    ) -> tuple[list[float], list[str]]:
        times: list[float] = []

        def took(step: float) -> None:
            times.append(step)
            if sum(times) > seconds and 2 <= len(times) < run.steps:
                raise Enough

        video, audio, text = inputs
        noise, notes = torch.Generator(self.device).manual_seed(SEED), list[str]()
        shared: dict[str, Any] = {"steps": run.steps, "noise": noise, "progress": False}
        shared["callback"] = lambda info: took(info.seconds)
        try:
            if run.preset != SECOND_STAGE:
                sample(model, video, audio, text, **shared)
            elif importlib.util.find_spec("diffusers"):
                small = self._clip("256p")
                first = torch.randn(1, video.shape[1], small.T, small.H, small.W, device=self.device)
                super_resolve(model, first, audio, text, size=(video.shape[3], video.shape[4]), **shared)
            else:
                notes.append("model evaluations alone: diffusers, whose UniPC advances the latents, is not installed")
                for _ in range(run.steps):
                    began = time.perf_counter()
                    with torch.no_grad():
                        model(*inputs)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    took(time.perf_counter() - began)
        except Enough:
            pass
        return times, notes

    def _clip(self, resolution: str, seconds: int = PUBLISHED_SECONDS) -> ClipTokens:
        if not self.tiny:
            return tokens_for(resolution, "16:9", seconds)
        clip = TINY_SIZE.clip
        return clip if resolution == "1080p" else clip._replace(H=clip.H // 2, W=clip.W // 2)

    def _config(self, preset: str) -> ModelConfig:
        config = ModelConfig.preset(preset)
        return TINY.replace(coords_style=config.coords_style) if self.tiny else config

    def _model_for(self, run: Run) -> HappyHorse:
        """The run's model: the one there is, where only sparsity or cap differ."""
        wanted = (run.preset, run.mode)
        if self._made_for != wanted:
            self._forget()
            config, fast = self._config(run.preset), run.fast
            if fast is None:
                self._model = random_eager(config, self.device, SEED)
                if run.mode == "torch.compile" and not self.tiny:
                    torch._dynamo.config.recompile_limit = 64  # kinds of layer times masks, not 8
                    for layer in self._model.block.layers:  # a graph of the whole model would take minutes to compile
                        layer.compile(dynamic=False)  # with sizes as unknowns the sort of segments breaks the graph
            else:
                self._model = self._fast(config, fast)
            self._made_for = wanted
        assert self._model is not None
        if run.fast is not None:
            state: Any = self._model.fast
            layers: Any = self._model.block.layers
            state.fast = run.fast
            for number, layer in enumerate(layers):
                layer.plan = dataclasses.replace(layer.plan, sparse=run.fast.is_sparse(number, len(layers)))
            state.forget()
        return self._model

    def _fast(self, config: ModelConfig, fast: FastConfig) -> HappyHorse:
        self._unverified = ""
        if self.tiny:
            return random_fast(config, fast, "reference", self.device, SEED)
        try:
            return random_fast(config, fast, self.backend, self.device, SEED)
        except BackendError as error:
            if self.backend != "auto" or self.device.type != "cuda" or lost(self.device):
                raise
            self._unverified = f"NOT VERIFIED, on backend triton nonetheless: {error}"
            return random_fast(config, fast, "triton", self.device, SEED)

    def _forget(self) -> None:
        self._model, self._made_for = None, ()
        gc.collect()
        if self.device.type == "cuda" and lost(self.device) is None:
            torch.cuda.empty_cache()

    def _cap(self, gb: int | None) -> None:
        if self.device.type != "cuda":
            return
        if gb is not None:
            self._forget()  # what was allocated before would not be capped
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(gb, total), self.device)


def softmax_of(model: HappyHorse) -> str:
    """Forms of the softmax in an accelerated model's layers, as :func:`bench.inputs.softmax` names them."""
    layers: Any = model.block.layers
    fit = (not uses_e4m3(layer.plan.precision["attention"]) and layer.bound.effective <= LIMIT for layer in layers)
    return " and ".join(sorted({BOUNDED if bounded else RUNNING for bounded in fit}))


def memory_fraction(gb: int | None, total: int) -> float:
    """Share of a card of ``total`` bytes that torch may allocate for it to behave as one that is sold as ``gb`` GB."""
    return 1.0 if gb is None else min(1.0, usable_bytes(gb) / total)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 where a run failed, 3 where the GPU is lost to this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.sampler", description=__doc__.partition("\n")[0])
    arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in plain torch: to try this file")
    parser.add_argument("--modes", default="", help=f"comma-separated, of {', '.join(MODES)}; all by default")
    parser.add_argument("--runs", default="", help=f"comma-separated parts of names such as {runs()[0].name}")
    per_run = "stop a run's steps after so long, two at least; by default 40 for fast runs, 10 for others"
    parser.add_argument("--seconds-per-run", type=float, help=per_run)
    parser.add_argument(
        "--backend", choices=("auto", "triton", "hopper", "cuda"), default="auto", help="of fast models"
    )
    parser.add_argument("--keep", choices=("none", "all"), default="none", help="leave out runs the results hold")
    options = parser.parse_args(argv)
    deadline, device = began(argv) + 60 * options.minutes, torch.device(options.device)
    try:
        wanted = chosen(options.runs, options.modes)
    except ValueError as error:
        parser.error(str(error))
    results = open_results(options.results, device)
    known = results.data["sampler"] if options.keep == "all" else []
    done: list[Json] = []
    with Monitor(device) as monitor:
        bench = Bench(device, options.tiny, options.backend, monitor)
        for run in wanted:
            if any(bench.named(run).items() <= entry.items() for entry in known):
                continue
            left = deadline - time.monotonic() - (0.0 if options.tiny else run.least_time)
            if left < 0:
                print(f"not run: {run.name} needs {run.least_time:.0f} s, {-left:.0f} more than are left", flush=True)
                continue
            most = left + 2 * run.step_seconds  # two that are timed are in what it needs at least
            entry = bench.run(run, min(options.seconds_per_run or run.most_time, most))
            print(json.dumps(entry), flush=True)
            done.append(entry)
            # A self-check that took the GPU is remembered: started again, the run goes on without that kernel.
            if not (bench.lost and entry["note"].startswith(NOT_RUN)):
                results.add("sampler", entry)
            if bench.lost:
                print(f"STOPPED: the GPU of this process is lost in {run.name}: {bench.lost}", file=sys.stderr)
                return LOST
    print(clip_table(results.data | {"sampler": done}).text())
    return int(any(entry["s_per_step"] is None and entry["note"].startswith(FAILED) for entry in done))


if __name__ == "__main__":
    sys.exit(main())
