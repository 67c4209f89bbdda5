"""The pony: grammar, codecs, how well its evaluator sees, the training forward, and what the shipped weights do."""

import csv
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sequence import Clip
from happyhorse_fast.pony import codec as codecs
from happyhorse_fast.pony import encode_image, generate, load_codecs, load_model
from happyhorse_fast.pony.measure import background, judge, measure
from happyhorse_fast.pony.metrics import log_spectral_distance, psnr
from happyhorse_fast.pony.prompt import (
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Prompt,
    all_prompts,
    encode_text,
    held_out_prompts,
    parse,
)
from happyhorse_fast.pony.weights import CODEC_FILE, PONY, WEIGHTS_FILE

EXAMPLE = Path(__file__).parents[2] / "examples" / "pony"


@pytest.fixture
def scripts(monkeypatch):
    """The example's folder on the path, as `python examples/pony/train.py` puts it there."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for path in EXAMPLE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def scenes(scripts):
    from world import draw_scene

    rng = random.Random(7)
    return [draw_scene(prompt, rng) for prompt in held_out_prompts()[:12]]


def test_every_prompt_parses_to_itself():
    prompts = all_prompts()
    assert len(prompts) == len(set(map(str, prompts))) == 216
    assert all(parse(str(prompt)) == prompt for prompt in prompts)
    assert parse("  A large RED ball  bounces twice ") == Prompt("large", "red", 2)


@pytest.mark.parametrize("text", ["", "a huge red ball bounces twice", "a large red ball bounces four times"])
def test_a_prompt_outside_the_grammar_is_told_the_grammar(text):
    with pytest.raises(ValueError, match="'a large red ball bounces twice'; got"):
        parse(text)


def test_text_tokens_are_words_of_one_hot_letters():
    tokens = encode_text("a large red ball bounces three times in the middle")
    assert tokens.shape == (1, TEXT_TOKENS, TEXT_CHANNELS)
    assert tokens[0].sum(dim=1).tolist() == [1, 5, 3, 4, 7, 5, 5, 2, 3, 6]
    assert encode_text("red")[0, 0].equal(tokens[0, 2])
    assert len({encode_text(str(prompt)).numpy().tobytes() for prompt in all_prompts()}) == 216


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "1 to 10 words"), ("a " * 11, "1 to 10 words, got 11"), ("ball2", "got 'ball2'"), ("abcdefghi", "8 letters")],
)
def test_text_that_has_no_tokens_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        encode_text(text)


def test_video_blocks_are_the_published_grid():
    frames = torch.rand(2, 9, 32, 48, 3)
    blocks = codecs.video_blocks(frames)
    assert blocks.shape == (2, 3, 2, 3, 4 * 16 * 16 * 3)
    first, second = blocks.unflatten(4, (4, 16, 16, 3))[0, 0, 1, 2], blocks.unflatten(4, (4, 16, 16, 3))[0, 1, 1, 2]
    assert all(picture.equal(frames[0, 0, 16:, 32:]) for picture in first)
    assert second.equal(frames[0, 1:5, 16:, 32:])
    with pytest.raises(ValueError, match="4n \\+ 1"):
        codecs.video_blocks(frames[:, :8])


def test_a_lossless_linear_codec_gives_the_pixels_back():
    size = 4 * 16 * 16 * 3
    exact = codecs.LinearCodec(torch.full((size,), 0.5), torch.eye(size), torch.eye(size))
    frames = torch.rand(1, 5, 16, 16, 3)
    torch.testing.assert_close(codecs.decode_video(exact, codecs.encode_video(exact, frames)), frames)


def test_codecs_pass_their_gate_and_keep_what_is_measured(scenes):
    from world import encode_audio, render_audio, render_video

    video, audio = load_codecs()
    frames, samples = render_video(scenes), render_audio(scenes)
    latent, sound = codecs.encode_video(video, frames), encode_audio(audio, samples)
    assert latent.shape[1:] == (48, 13, 8, 8) and sound.shape[1:] == (49, 64)
    assert 0.8 < latent.std() < 1.2 and 0.8 < sound.std() < 1.2
    decoded, heard = codecs.decode_video(video, latent), codecs.decode_audio(audio, sound)
    assert psnr(frames, decoded).min() > 30
    assert log_spectral_distance(samples, heard).max() < 3
    for scene, *clips in zip(scenes, frames, samples, decoded, heard, strict=True):
        for picture, wave in (clips[:2], clips[2:]):
            found = measure(picture, wave)
            assert all(judge(scene.prompt, found).values()), (scene, found)
            seen = zip(found.seen, scene.impacts(), strict=True)
            assert all(abs(a - b) <= 1 for a, b in seen)


def test_the_evaluator_tells_clips_apart(scenes):
    from evaluate import rates
    from world import render_audio, render_video

    frames, samples = render_video(scenes), render_audio(scenes)
    found = [measure(*clip) for clip in zip(frames, samples.roll(1, 0), strict=True)]
    shuffled = rates([judge(scene.prompt, m) for scene, m in zip(scenes[1:] + scenes[:1], found, strict=True)])
    assert max(shuffled[name] for name in ("colour", "size", "bounces", "sync")) < 0.7
    assert shuffled["all"] == 0
    empty = measure(background().expand_as(frames[0]), torch.zeros_like(samples[0]))
    assert empty.colour is None and empty.seen == [] and empty.heard == [] and not empty.in_sync


def test_held_out_prompts_are_not_trained_on(scripts):
    from clips import training_prompts

    held_out, trained = set(held_out_prompts()), set(training_prompts())
    assert len(held_out) == 64 and len(trained) == 152 and not held_out & trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_runs_the_reference_model(scripts, dtype):
    from batched import BatchedHappyHorse

    model = HappyHorse(PONY, dtype, param_dtype=torch.float32).init_weights(3)
    batched = BatchedHappyHorse(model, Clip(6, 2, 2, 21, 4))
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 48, 6, 4, 4), (2, 21, 64), (2, 4, TEXT_CHANNELS)
    clips = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        got = batched(*clips)
        single = [model(*(x[i : i + 1] for x in clips)) for i in range(2)]
    for value, *wanted in zip(got, *single, strict=True):
        error = (value - torch.cat(wanted)).norm() / torch.cat(wanted).norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_losses_vanish_for_a_model_that_knows_the_clip(scripts):
    from losses import Noised, draw_levels

    generator = torch.Generator().manual_seed(0)
    shapes = (64, 48, 3, 4, 4), (64, 9, 64), (64, 4, TEXT_CHANNELS)
    clips = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    sigma = draw_levels(64, generator)
    assert 0 < sigma.min() < 0.5 and 0.98 < sigma.max() < 1
    state = Noised(clips, sigma, generator)

    def oracle(video, audio, text):
        return (video - clips[0]) / state.video_sigma, (audio - clips[1]) / state.audio_sigma

    def ignorant(video, audio, text):
        return torch.zeros_like(video), torch.zeros_like(audio)

    assert 0 < state.given.sum() < 32
    for _ in range(2):
        assert state.video[state.given, :, 0].equal(clips[0][state.given, :, 0])
        assert max(error.max() for error in state.errors(oracle)) < 1e-8
        assert all(1.8 < error.mean() < 2.2 for error in state.errors(ignorant))
        state.advance(oracle, sigma * 0.9)
        assert state.sigma.equal(sigma * 0.9)


def test_rollouts_go_by_the_samplers_levels_and_score_the_clean_clip(scripts):
    from losses import STEPS, rollout_errors

    from happyhorse_fast.sampler.distilled import noise_levels

    generator = torch.Generator().manual_seed(0)
    clips = tuple(torch.randn(shape, generator=generator) for shape in ((16, 48, 13, 8, 8), (16, 9, 64), (16, 4, 8)))
    levels, calls = torch.tensor(noise_levels(STEPS, 5.0))[:STEPS], []

    def knows_the_level(video, audio, text):
        unlike = (video - clips[0])[:, :, 1:]  # noise minus clip, times sigma: variance 2 sigma^2
        sigma = unlike.square().mean(dim=(1, 2, 3, 4)).div(2).sqrt()
        sigma = levels[(sigma[:, None] - levels).abs().argmin(dim=1)]
        calls.append(sigma)
        video_v = (video - clips[0]) / sigma[:, None, None, None, None]
        return video_v, (audio - clips[1]) / sigma[:, None, None]

    video, audio = rollout_errors(knows_the_level, clips, generator)
    assert 2 <= len(calls) <= 4 and all((after < before).all() for before, after in pairwise(calls))
    assert max(video.max(), audio.max()) < 1e-2


def test_muon_steps_are_orthogonal_per_expert(scripts):
    from muon import orthogonal

    gradient = (
        torch.randn(3, 96, 32, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonal(gradient).float())
    assert values.shape == (3, 32) and values.min() > 0.3 and values.max() < 1.5


@pytest.mark.slow
def test_training_stops_and_goes_on(scripts, tmp_path, capsys):
    import train

    def run(steps):
        files = ["--folder", str(tmp_path), "--weights", str(tmp_path / "model.safetensors")]
        train.main([*files, "--steps", str(steps), "--rollouts-from", "2", "--batch", "2", "--log", "1"])

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        run(2)
        first = load_file(tmp_path / "model.safetensors")
        run(4)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert "going on from step 2" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "loss.csv").open(newline="")))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[3]["rollout_video"] and not rows[3]["video"] and not rows[2]["rollout_video"]
    second = load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys() == dict(load_model().named_parameters()).keys()
    assert not first["final_linear_video.weight"].equal(second["final_linear_video.weight"])


def test_package_data_is_small_and_the_model_within_8_million_parameters():
    assert CODEC_FILE.stat().st_size + WEIGHTS_FILE.stat().st_size <= 16 << 20
    assert sum(p.numel() for p in load_model().parameters()) <= 8_000_000


def test_clips_of_unseen_prompts_show_and_sound_as_asked():
    model = load_model()
    prompts = [prompt for prompt in held_out_prompts() if prompt.place is not None][:12]
    clips = [generate(model, str(prompt), seed=i) for i, prompt in enumerate(prompts)]
    judged = [judge(prompt, measure(c.frames, c.samples)) for prompt, c in zip(prompts, clips, strict=True)]
    assert all(sum(row[name] for row in judged) >= least for name, least in (("colour", 11), ("sync", 10))), judged


def test_the_same_seed_gives_the_same_clip():
    model = load_model()
    first, again, other = (generate(model, "a large red ball bounces twice", seed=s, steps=2) for s in (5, 5, 6))
    assert first.frames.shape == (49, 128, 128, 3) and first.samples.shape == (24500,)
    assert first.video.equal(again.video) and first.audio.equal(again.audio)
    assert not first.video.equal(other.video)


def test_an_image_is_the_first_frame(scenes):
    from world import render_video

    picture = render_video(scenes[:1])[0, 0]
    latent = encode_image(picture)
    clip = generate(load_model(), str(scenes[0].prompt), image=latent, steps=2)
    assert clip.video[:, :, :1].equal(latent)
    assert (clip.frames[0] - picture).square().mean() < 1e-3
    with pytest.raises(ValueError, match="picture"):
        encode_image(picture[:64])


def test_a_clip_is_written_with_sound(tmp_path):
    import av

    from happyhorse_fast.pony.media import write_mp4

    seconds = torch.arange(49 * codecs.FRAME_SAMPLES) / codecs.SAMPLE_RATE
    write_mp4(tmp_path / "clip.mp4", torch.rand(49, 32, 32, 3), torch.sin(2000 * seconds) / 2, scale=2)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        pictures = list(container.decode(video=0))
    assert len(pictures) == 49 and (pictures[0].height, pictures[0].width) == (64, 64)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        sound = list(container.decode(audio=0))
    assert sound[0].sample_rate == codecs.SAMPLE_RATE
    assert abs(sum(frame.samples for frame in sound) - len(seconds)) < 3000
