"""Measure the pony on prompts it never saw: does it show and sound what was asked?

Run with ``python examples/pony/evaluate.py --clips 64``.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from world import draw_scene, render_video

from happyhorse_fast.pony import PonyClip, encode_image, generate, load_model
from happyhorse_fast.pony.measure import judge, measure
from happyhorse_fast.pony.media import contact_sheet
from happyhorse_fast.pony.prompt import Prompt, held_out_prompts
from happyhorse_fast.pony.weights import weights_digest

SHOWN = 5
"""Clips on the contact sheet, spread over all of them."""


def first_picture(prompt: Prompt, seed: int) -> torch.Tensor:
    """[1, 48, 1, 8, 8] latent of the first picture of a clip that ``prompt`` describes."""
    return encode_image(render_video([draw_scene(prompt, random.Random(seed))])[0, 0])


def rates(judged: list[dict[str, bool]]) -> dict[str, float]:
    """Compute the share of clips that meet each criterion."""
    return {name: sum(row[name] for row in judged) / len(judged) for name in judged[0]}


def save_small(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours: a third of the size, for pictures that are committed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Sample, measure, print; with ``--out`` the first clips as a contact sheet and all rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="one per held-out prompt, then the next seeds")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", action="store_true", help="image to video: give the first picture of a drawn clip")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for sheet.png and rates.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    model, prompts = load_model(), held_out_prompts()
    clips: list[PonyClip] = []
    judged, failed = [], []
    for i in range(arguments.clips):
        prompt = prompts[i % len(prompts)]
        image = first_picture(prompt, arguments.seed + i) if arguments.image else None
        clip = generate(model, str(prompt), seed=arguments.seed + i, steps=arguments.steps, image=image)
        found = measure(clip.frames, clip.samples)
        judged.append(judge(prompt, found))
        wrong = [name for name, right in judged[-1].items() if not right and name != "all"]
        if wrong:
            failed.append({"prompt": str(prompt), "seed": arguments.seed + i, "wrong": wrong})
            print(f"{prompt}: wrong {', '.join(wrong)}; {found}", flush=True)
        clips.append(clip)
    result = rates(judged)
    print(", ".join(f"{name} {100 * rate:.0f} %" for name, rate in result.items()))
    print(f"{len(judged)} clips in {time.perf_counter() - start:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_small(contact_sheet(clips[:: -(-len(clips) // SHOWN)]), arguments.out / "sheet.png")
        report = {
            "weights": weights_digest(),
            "clips": len(judged),
            "steps": arguments.steps,
            "image": arguments.image,
            "rates": result,
            "failed": failed,
        }
        (arguments.out / "rates.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
