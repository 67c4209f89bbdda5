"""Fit the linear codecs to the data set by PCA, gate their round trip, and write them into the package.

Run with ``python examples/pony/fit_codec.py``.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from safetensors.torch import save_file
from world import draw_scene, encode_audio, render_audio, render_video

from happyhorse_fast.config import LATENT_CHANNELS
from happyhorse_fast.pony import codec as codecs
from happyhorse_fast.pony.codec import LinearCodec
from happyhorse_fast.pony.metrics import log_spectral_distance, psnr
from happyhorse_fast.pony.prompt import all_prompts
from happyhorse_fast.pony.weights import CODEC_FILE

AUDIO_CHANNELS = 64
WHITENING = 0.5
"""Power of a channel's standard deviation that it is divided by: 1 would make faint channels as loud as strong ones."""


class Moments:
    """Mean and covariance of rows, added up batch by batch in float64."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.total = torch.zeros(features, dtype=torch.float64)
        self.outer = torch.zeros(features, features, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Count [rows, features] in."""
        self.count += len(rows)
        self.total += rows.sum(dim=0, dtype=torch.float64)
        self.outer += (rows.T @ rows).double()

    def fit(self, channels: int) -> LinearCodec:
        """PCA to ``channels``, each scaled by its deviation to the power WHITENING; mean variance 1 over channels."""
        mean = self.total / self.count
        values, vectors = torch.linalg.eigh(self.outer / self.count - mean.outer(mean))
        deviation, basis = values[-channels:].clamp(min=1e-12).sqrt().flip(0), vectors[:, -channels:].flip(1)
        scale = deviation.pow(-WHITENING)
        scale /= (scale * deviation).square().mean().sqrt()
        parts = (mean, basis * scale, (basis / scale).T)
        return LinearCodec(*(x.bfloat16().float().contiguous() for x in parts))


def fit(clips: int, seed: int) -> tuple[LinearCodec, LinearCodec]:
    """Video and audio codec from ``clips`` clips of prompts drawn with ``seed``."""
    rng = random.Random(seed)
    prompts = all_prompts()
    video, audio = Moments(4 * 16 * 16 * 3), Moments(codecs.FRAME_SAMPLES)
    for _ in range(clips // 8):
        scenes = [draw_scene(rng.choice(prompts), rng) for _ in range(8)]
        video.add(codecs.video_blocks(render_video(scenes)).flatten(0, 3))
        audio.add(render_audio(scenes).reshape(-1, codecs.FRAME_SAMPLES))
    return video.fit(LATENT_CHANNELS), audio.fit(AUDIO_CHANNELS)


def main() -> None:
    """Fit, gate, save."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and a slip, do not start it
    start = time.perf_counter()
    video, audio = fit(clips=480, seed=0)
    rng = random.Random(1)
    scenes = [draw_scene(rng.choice(all_prompts()), rng) for _ in range(32)]
    frames, samples = render_video(scenes), render_audio(scenes)
    latent, sound = codecs.encode_video(video, frames), encode_audio(audio, samples)
    ratio = psnr(frames, codecs.decode_video(video, latent))
    distance = log_spectral_distance(samples, codecs.decode_audio(audio, sound))
    print(f"video: PSNR mean {ratio.mean():.1f} dB, worst {ratio.min():.1f} dB; latent std {latent.std():.2f}")
    print(
        f"audio: log-spectral distance mean {distance.mean():.2f} dB, worst {distance.max():.2f} dB; "
        f"latent std {sound.std():.2f}"
    )
    print(f"{time.perf_counter() - start:.0f} s")
    if ratio.min() < 30 or distance.max() > 3:
        raise SystemExit("the codecs do not pass their gate (30 dB, 3 dB); nothing saved")
    fitted = {"video": vars(video), "audio": vars(audio)}
    tensors = {f"{prefix}.{name}": value for prefix, parts in fitted.items() for name, value in parts.items()}
    save_file({name: value.bfloat16().contiguous() for name, value in tensors.items()}, CODEC_FILE)
    CODEC_FILE.chmod(0o644)  # package data: safetensors makes it readable to its owner alone


if __name__ == "__main__":
    main()
