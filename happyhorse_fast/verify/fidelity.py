"""Measure the cost of precision and sparsity: clips of the pony, each policy against float32's clip of the same noise.

A clip of the pony has two blocks of 128 video tokens, too few to leave any out. Sparsity is therefore measured with
blocks of one latent frame, 13 of 16 tokens (:mod:`happyhorse_fast.verify.frame_blocks`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from happyhorse_fast import ambient
from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.budgets import measure as tensor_error
from happyhorse_fast.config import OPS
from happyhorse_fast.fast.accelerate import accelerate
from happyhorse_fast.fast.attention import AttentionInputs
from happyhorse_fast.fast.config import FastConfig, Tiles, TopK, default_attention, is_exact_step
from happyhorse_fast.fast.state import FastState
from happyhorse_fast.pony import PonyClip, encode_image, generate, load_model
from happyhorse_fast.pony.generate import CLIP
from happyhorse_fast.pony.measure import Measured, judge, largest_shift, measure
from happyhorse_fast.pony.metrics import log_spectral_distance, psnr, ssim
from happyhorse_fast.pony.prompt import Prompt, held_out_prompts, parse
from happyhorse_fast.pony.weights import weights_digest
from happyhorse_fast.verify.equivalence import BF16_RATIO, EAGER
from happyhorse_fast.verify.forms import Form
from happyhorse_fast.verify.frame_blocks import decide_between_frames

Kind = Literal["bf16", "int8 op", "int8", "fp8 op", "fp8", "sparsity"]
PICTURES_DB = {"int8": 40.0, "fp8": 30.0}
"""Median PSNR below which a precision is broken rather than coarse; measured: 57 in int8, 45 to 47 in fp8."""
QUICK_SPARSITY = ("exact window", "top-k 0.25")
EVERYWHERE = 64
"""Rows and columns past any frame of the pony's: a tile window of this size is one of frames alone."""


@dataclass(frozen=True)
class Policy:
    """One way to run the model.

    Attributes:
        name: Shown.
        kind: What it is to be compared with; of ``"sparsity"`` every latent frame sits in a block of its own.
        fast: The acceleration; None for eager bf16.
    """

    name: str
    kind: Kind
    fast: FastConfig | None


def policies(*, quick: bool = False) -> tuple[Policy, ...]:
    """List every policy, or with ``quick`` the main ones: bf16, 8 bits as a whole, a quarter of the pairs."""

    def fast(**options: Any) -> FastConfig:
        return FastConfig(**{"attention": "bf16", **options}, backend="reference", originals="drop")

    def alone(op: str, kind: Kind, **options: Any) -> Policy:
        return Policy(f"{op} alone", kind, fast(skip=tuple(other for other in OPS if other != op), **options))

    def whole(name: str, precision: Literal["int8", "fp8"], **options: Any) -> Policy:
        return Policy(name, precision, fast(precision=precision, **options))

    def sparse(name: str, sparsity: TopK | Tiles | None, **options: Any) -> Policy:
        return Policy(name, "sparsity", fast(sparsity=sparsity, **options))

    mixed = ("int8_qk", "int8_qk_fp8_v")
    every = (
        Policy(EAGER, "bf16", None),
        Policy("fast bf16", "bf16", fast()),
        *(alone(op, "int8 op", precision="int8", attention="int8_qk") for op in OPS),
        *(alone(op, "fp8 op", precision="fp8", attention="fp8") for op in OPS),
        whole("all but attention", "int8"),
        *(whole(f"all, attention {attention}", "int8", attention=attention) for attention in mixed),
        whole("all but qkv and attention", "fp8", skip=("qkv",)),
        whole("all but attention", "fp8"),
        *(whole(f"all, attention {attention}", "fp8", attention=attention) for attention in mixed),
        whole("all", "fp8", attention="fp8"),
        sparse("exact window", None),
        *(sparse(f"top-k {share:.3g}", TopK(share)) for share in (0.5, 0.25, 0.125)),
        *(sparse(f"tiles, {reach} frames", Tiles(reach, EVERYWHERE, EVERYWHERE)) for reach in (3, 1, 0)),
        sparse("top-k 0.25 from step 5 on", TopK(0.25), exact_first_steps=4),
    )
    return tuple(p for p in every if not quick or p.kind in ("bf16", "int8", "fp8") or p.name in QUICK_SPARSITY)


@dataclass(frozen=True)
class ClipError:
    """Distance between one clip and float32's.

    Attributes:
        prompt: What was asked for.
        psnr_db: Of all pictures.
        ssim: Mean over pictures.
        sound_db: Log-spectral distance.
        seen_shift: Frames by which a seen impact moved, at most; None where another number is seen.
        heard_shift: Likewise of heard impacts.
        sync_error: Frames between an impact's picture and its sound, at most; None where there is no such pair.
        video_error: Relative L2 of the latent.
        audio_error: Relative L2 of the latent.
        right: Whether the clip shows and sounds all that was asked for.
    """

    prompt: str
    psnr_db: float
    ssim: float
    sound_db: float
    seen_shift: float | None
    heard_shift: float | None
    sync_error: float | None
    video_error: float
    audio_error: float
    right: bool


@dataclass(frozen=True)
class Summary:
    """Numbers that summarise all clips of one policy.

    Attributes:
        psnr_db: Median, and the worst clip's.
        ssim: Likewise.
        sound_db: Likewise.
        video_error: Likewise.
        audio_error: Likewise.
        moved: Clips in which a heard impact moved by more than half a frame, or another number is heard.
        seen_moved: Likewise of seen impacts, by more than a frame.
        sync_error: Mean over the clips that have one, and the largest, in frames.
        right: Clips that show and sound all that was asked for.
        clips: All of them.
    """

    psnr_db: tuple[float, float]
    ssim: tuple[float, float]
    sound_db: tuple[float, float]
    video_error: tuple[float, float]
    audio_error: tuple[float, float]
    moved: int
    seen_moved: int
    sync_error: tuple[float, float] | None
    right: int
    clips: int

    @classmethod
    def of(cls, clips: tuple[ClipError, ...]) -> Summary:
        """Summarise at least one clip."""

        def spread(name: str, worst: Callable[[list[float]], float] = max) -> tuple[float, float]:
            values = [getattr(clip, name) for clip in clips]
            return statistics.median(values), worst(values)

        sync = [clip.sync_error for clip in clips if clip.sync_error is not None]
        return cls(
            psnr_db=spread("psnr_db", min),
            ssim=spread("ssim", min),
            sound_db=spread("sound_db"),
            video_error=spread("video_error"),
            audio_error=spread("audio_error"),
            moved=sum(clip.heard_shift is None or clip.heard_shift > 0.5 for clip in clips),
            seen_moved=sum(clip.seen_shift is None or clip.seen_shift > 1 for clip in clips),
            sync_error=(statistics.mean(sync), max(sync)) if sync else None,
            right=sum(clip.right for clip in clips),
            clips=len(clips),
        )


@dataclass(frozen=True)
class PolicyResult:
    """All clips of one policy.

    Attributes:
        name: Of the policy.
        kind: Of the policy.
        settings: Fields of its FastConfig that are not the default's.
        kept: Share of the exact map's video-to-video pairs that are computed, mean over layers and steps.
        summary: Of all clips.
        clips: In the order of the prompts.
    """

    name: str
    kind: Kind
    settings: str
    kept: float
    summary: Summary
    clips: tuple[ClipError, ...]


@dataclass(frozen=True)
class Fidelity:
    """Results of all policies.

    Attributes:
        weights: SHA-256 of the weights that it holds for.
        steps: Denoising steps.
        right: Clips of float32 that show and sound all that was asked for.
        clips: Prompts.
        results: Per policy.
    """

    weights: str
    steps: int
    right: int
    clips: int
    results: tuple[PolicyResult, ...]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for a while: on tensors this small several wait for each other, ten times as long on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@ambient.independent
@one_thread()
def measure_fidelity(
    chosen: tuple[Policy, ...],
    clips: int,
    *,
    steps: int = 8,
    progress: Callable[[str], None] = lambda line: None,
) -> Fidelity:
    """Sample held-out prompts in float32 and under every policy; the i-th has seed i.

    Args:
        chosen: Policies.
        clips: Prompts, 1 to 64.
        steps: Denoising steps.
        progress: Called with a line per policy.

    Raises:
        ValueError: ``clips`` is out of range.
    """
    if not 1 <= clips <= len(held_out_prompts()):
        raise ValueError(f"clips must be 1 to {len(held_out_prompts())}, got {clips}")
    prompts = held_out_prompts()[:clips]
    exact = list(_clips(load_model(torch.float32), prompts, steps))
    found = [measure(clip.frames, clip.samples) for clip in exact]
    results = []
    for policy in chosen:
        start = time.perf_counter()
        model = load_model(torch.bfloat16)
        if policy.fast is not None:
            accelerate(model, policy.fast)
            if policy.kind == "sparsity":
                decide_between_frames(model)
        errors = tuple(
            compare(prompt, clip, of, seen)
            for prompt, clip, of, seen in zip(prompts, _clips(model, prompts, steps), exact, found, strict=True)
        )
        kept, summary = kept_share(model, steps), Summary.of(errors)
        results.append(PolicyResult(policy.name, policy.kind, settings(policy.fast), kept, summary, errors))
        progress(f"{policy.kind}, {policy.name}: {time.perf_counter() - start:.0f} s")
    right = sum(judge(prompt, m)["all"] for prompt, m in zip(prompts, found, strict=True))
    return Fidelity(weights_digest(), steps, right, clips, tuple(results))


def violations(found: Fidelity) -> Iterator[str]:
    """Yield a sentence for each policy past its budget: eager bf16's own error in bf16, a sanity bound in 8 bits."""
    by_name = {(result.kind, result.name): result.summary for result in found.results}
    eager = by_name.get(("bf16", EAGER))
    for (kind, name), summary in by_name.items():
        if kind == "bf16" and name != EAGER and eager is not None:
            for what in ("video_error", "audio_error"):
                error, budget = getattr(summary, what)[0], BF16_RATIO * getattr(eager, what)[0]
                if not error <= budget:
                    yield f"{name}: median {what} is {error:.1e}, budget {budget:.1e} ({BF16_RATIO:g} x eager bf16's)"
        least = PICTURES_DB.get(kind, 0.0)
        if not summary.psnr_db[0] >= least:
            yield f"{kind}, {name}: median PSNR is {summary.psnr_db[0]:.1f} dB, at least {least:g} allowed"


def _clips(model: Any, prompts: list[Prompt], steps: int) -> Iterator[PonyClip]:
    return (generate(model, str(prompt), seed=seed, steps=steps) for seed, prompt in enumerate(prompts))


def compare(prompt: Prompt, clip: PonyClip, exact: PonyClip, seen: Measured) -> ClipError:
    """Compare one clip with float32's, whose impacts are ``seen``."""
    found = measure(clip.frames, clip.samples)
    return ClipError(
        str(prompt),
        float(psnr(exact.frames[None], clip.frames[None])),
        float(ssim(exact.frames, clip.frames).mean()),
        float(log_spectral_distance(exact.samples[None], clip.samples[None])),
        largest_shift(found.seen, seen.seen),
        largest_shift(found.heard, seen.heard),
        found.sync_error,
        tensor_error(clip.video, exact.video).relative_l2,
        tensor_error(clip.audio, exact.audio).relative_l2,
        judge(prompt, found)["all"],
    )


@dataclass(frozen=True)
class ClipRun:
    """A clip as one form made it.

    Attributes:
        form: Its name.
        clip: Pictures, sound and latents.
        seconds: Of sampling and decoding.
        error: Distance from the first form's clip.
    """

    form: str
    clip: PonyClip
    seconds: float
    error: ClipError


@one_thread()
def make_clips(
    prompt: str, forms: Sequence[Form], *, seed: int, steps: int, picture: torch.Tensor | None = None
) -> list[ClipRun]:
    """Make the same clip, from the same noise, in several forms; each is compared with the first.

    Args:
        prompt: In the grammar of :mod:`happyhorse_fast.pony.prompt`.
        forms: How to run the model.
        seed: Of all noise.
        steps: Denoising steps.
        picture: [128, 128, 3] in 0..1, the first picture.
    """
    image, asked = None if picture is None else encode_image(picture), parse(prompt)
    made: list[tuple[str, PonyClip, float]] = []
    for form in forms:
        model = form.apply(load_model(torch.float32 if form.precision == "fp32" else torch.bfloat16))
        start = time.perf_counter()
        clip = generate(model, prompt, seed=seed, steps=steps, image=image)
        made.append((form.name, clip, time.perf_counter() - start))
    first = made[0][1]
    seen = measure(first.frames, first.samples)
    return [ClipRun(name, clip, seconds, compare(asked, clip, first, seen)) for name, clip, seconds in made]


def settings(fast: FastConfig | None) -> str:
    """List the fields of a configuration that are not the default's, without its backend and its originals."""
    if fast is None:
        return ""
    default = dataclasses.replace(FastConfig(), attention=default_attention(fast.precision))
    fields = (f.name for f in dataclasses.fields(fast) if f.name not in ("backend", "originals"))
    return ", ".join(f"{n}={getattr(fast, n)!r}" for n in fields if getattr(fast, n) != getattr(default, n))


@ambient.independent
def kept_share(model: Any, steps: int) -> float:
    """Share of the exact maps' video-to-video pairs that a model's sparsity computes; 1 where there is none.

    The mean over layers and denoising steps. How many blocks a row keeps does not depend on q and k, so zeros stand for
    them; of TopP, which no policy has, that is not true.
    """
    fast: FastState | None = getattr(model, "fast", None)
    if fast is None or fast.fast.sparsity is None:
        return 1.0
    config, state = fast.config, fast.clips[CLIP]
    video = state.token_rows[: CLIP.video]
    heads = (config.num_heads_q, config.num_heads_kv)
    q, k = (torch.zeros(state.rows.slots, n, config.head_dim).bfloat16() for n in heads)
    x = AttentionInputs(q, k, k, None, None, None, q[..., 0].float())

    def pairs(block_map: BlockMap) -> float:
        return float(block_map.to_dense()[:, video][:, :, video].float().mean())

    how, kept, exact = fast.fast, 0.0, 0.0
    exact_steps = [is_exact_step(step, steps, how.exact_first_steps, how.exact_last_steps) for step in range(steps)]
    for layer in model.block.layers:
        base, sparse = (pairs(state.block_map(layer.plan, x, exact=whole)) for whole in (True, False))
        share = exact_steps.count(False) / steps if layer.plan.sparse else 0.0
        exact += base
        kept += share * sparse + (1 - share) * base
    return kept / exact
