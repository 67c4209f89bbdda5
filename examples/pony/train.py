"""Train the pony: flow matching at the noise levels of the 8-step sampler, later also on the sampler's own states.

Run with ``nice -n 19 python examples/pony/train.py --compile``. Ctrl-C stops it; started again, it goes on from
``runs/pony/state.pt``. What is written into the package is the moving average of the weights. The same seed gives the
same run within a machine, if it stops at the same steps: a start fills its pool of clips anew.
"""

from __future__ import annotations

import argparse
import csv
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from batched import BatchedHappyHorse
from clips import Clips
from losses import flow_errors, rollout_errors
from muon import Muon
from safetensors.torch import save_file

from happyhorse_fast.eager.model import HappyHorse, Weight
from happyhorse_fast.pony.generate import CLIP
from happyhorse_fast.pony.weights import PONY, WEIGHTS_FILE

RUN = Path(__file__).parent / "runs" / "pony"


def init_for_training(model: HappyHorse, seed: int) -> None:
    """Matrices ~ N(0, 1/fan_in), the outputs of both branches scaled down by depth, norms and biases at zero."""
    model.init_weights(seed)
    depth = (2 * model.config.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("linear_proj.weight", "down_proj.weight")):
                parameter.mul_(depth)
            elif name.startswith("final_linear"):
                parameter.mul_(0.1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear over the first 200 steps, then a half cosine over the run down to 2 % of ``peak``."""
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def export(average: dict[str, torch.Tensor], path: Path) -> None:
    """Write the averaged weights, bf16."""
    save_file({name: value.bfloat16().contiguous() for name, value in average.items()}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    path.chmod(0o644)  # package data: safetensors makes it readable to its owner alone


def train(arguments: argparse.Namespace) -> None:
    """Run to the last step or a signal; state, curve and weights are written every ``--every`` steps."""
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = HappyHorse(PONY, torch.bfloat16, param_dtype=torch.float32)
    init_for_training(model, arguments.seed)
    batched = BatchedHappyHorse(model, CLIP)
    if arguments.compile:
        batched.compile()
    stacked = [(m.weight, m.experts) for m in model.block.modules() if isinstance(m, Weight) and m.weight.dim() == 2]
    inside = {id(weight) for weight, _ in stacked}
    optimizers: list[torch.optim.Optimizer] = [
        Muon(stacked, lr=arguments.lr),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], betas=(0.9, 0.98), weight_decay=0.0),
    ]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, spent = 0, 0.0
    state_file, curve_file = arguments.folder / "state.pt", arguments.folder / "loss.csv"
    if state_file.exists():
        state: dict[str, Any] = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, step, spent = state["average"], state["step"], state["spent"]
        header, *lines = curve_file.read_text().splitlines(keepends=True)
        curve_file.write_text(header + "".join(line for line in lines if int(line.split(",")[0]) <= step))
        print(f"going on from step {step}, {spent / 60:.1f} minutes", flush=True)
    else:
        curve_file.write_text("step,minutes,video,audio,rollout_video,rollout_audio,lr\n")
    clips = Clips(arguments.seed * 1_000_003 + step, first=8 * arguments.batch)
    generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
    start = time.perf_counter() - spent
    sums, counts = torch.zeros(2, 2), torch.zeros(2, 1)  # of flow matching and rollouts, of video and audio
    asked = threading.Event()  # a signal lets the step finish, so what is saved is whole
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    while step < arguments.steps and not asked.is_set():
        lr = learning_rate(step, arguments.steps, arguments.lr)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        kind = step % 2 if step >= arguments.rollouts_from else 0
        errors = (flow_errors, rollout_errors)[kind](batched, clips.draw(arguments.batch), generator)
        video_loss, audio_loss = (error.mean() for error in errors)
        model.zero_grad(set_to_none=True)
        (video_loss + arguments.audio_weight * audio_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - decay)
        step, spent = step + 1, time.perf_counter() - start
        sums[kind] += torch.stack([video_loss.detach(), audio_loss.detach()])
        counts[kind] += 1
        stop = step == arguments.steps or asked.is_set()
        if step % arguments.log == 0 or stop:
            means = ["" if mean.isnan() else f"{mean:.5f}" for mean in (sums / counts).flatten()]
            sums.zero_(), counts.zero_()
            print(f"{step} {spent / 60:.2f} min, video and audio: {', '.join(filter(None, means))}", flush=True)
            with curve_file.open("a", newline="") as file:
                csv.writer(file).writerow([step, f"{spent / 60:.3f}", *means, f"{lr:.2e}"])
        if step % arguments.every == 0 or stop:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "average": average,
                    "step": step,
                    "spent": spent,
                },
                state_file.with_suffix(".partial"),
            )
            state_file.with_suffix(".partial").replace(state_file)
            export(average, arguments.weights)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rollouts-from", type=int, default=2000, help="step from which every other is a rollout")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--audio-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "runs" / "pony", help="of state and curve"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE, help="what to write")
    parser.add_argument("--log", type=int, default=25)
    parser.add_argument("--every", type=int, default=250, help="steps between saves")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster after its first minutes")
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
