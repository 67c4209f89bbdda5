"""Memory of the whole path: what must fit, traces of what runs, and the factors of the libraries' parts."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.config import ModelConfig
from happyhorse_fast.costs import usable_bytes
from happyhorse_fast.fast.memory import StorageMeter
from happyhorse_fast.pipeline import memory_plan, stage_plan, tiling
from happyhorse_fast.pipeline.memory_plan import PipelinePlan, budget_of, plan
from happyhorse_fast.pipeline.request import Request
from happyhorse_fast.pipeline.stage_plan import StagePlan, Work, stage_plans
from happyhorse_fast.sampler.sample import sample

GIB = 2**30
FIRST, SECOND = (ModelConfig.preset(f"davinci-magihuman{name}") for name in ("", "-sr-1080p"))
SMALL = {"stages": 1, "resolution": "256p"}


def work(seconds=5, precision="fp8", decoder="turbo", **settings):
    request = Request(**{"prompt": "x", "seconds": seconds, "image": True} | settings)
    return Work(request=request, models=(FIRST, SECOND)[: request.stages], precision=precision, decoder=decoder)


def card(gb):
    return int(usable_bytes(gb))


@pytest.mark.quick(2)
@pytest.mark.parametrize("seconds", [5, 15])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_eight_bits_fit_a_card_of_24_gb_and_stay_on_one_of_80(seconds, precision):
    small, large = (plan(work(seconds, precision=precision), card(gb)) for gb in (24, 80))
    assert small.fits and not {"text_encoder", *MODELS} & set(small.kept)
    assert small.peak_bytes <= 21.8 * GIB
    assert (small.tiles, small.layers_on_device) == (1, None)
    assert small.history_on_host == (precision == "int8" and seconds == 15)
    assert large.fits and large.placement == "resident" and not large.history_on_host
    assert 53.5 * GIB < large.peak_bytes < 54 * GIB
    assert [stage.name for stage in small.stages] == [
        "text", "image", "denoise", "super-resolve", "decode audio", "decode video"
    ]  # fmt: skip


def test_bf16_fits_48_gb_one_part_at_a_time_and_not_80_all_at_once():
    found = {gb: plan(work(precision="bf16"), card(gb)) for gb in (24, 48, 80)}
    assert {gb: one.fits for gb, one in found.items()} == {24: False, 48: True, 80: True}
    assert found[24].kept == () and "text_encoder" not in found[80].kept
    assert found[80].resident_bytes > card(80)


def test_the_floor_of_five_seconds_at_1080p_is_within_the_target():
    found = plan(work(precision="fp8"), None)
    floors = {stage.name: stage.floor_s for stage in found.stages}
    assert floors["super-resolve"] == pytest.approx(13.3, rel=0.01)
    assert floors["decode video"] == pytest.approx(1.19e15 / 989e12, rel=0.02)
    assert found.floor_s < 30


@pytest.mark.parametrize("changes", [{}, {"sound": True, "image": False, "first": "base", "decoder": "wan"}])
def test_floors_are_those_of_the_plan_without_its_traces(changes):
    wanted = work(precision="fp8", **changes)
    quick, traced = stage_plans(wanted, traced=False), plan(wanted, None).stages
    assert [(stage.name, stage.part, stage.floor_s) for stage in quick] == [
        (stage.name, stage.part, stage.floor_s) for stage in traced
    ]


def test_the_default_device_is_not_where_a_plan_is_made():
    sizes = (8, 16, 16, 1)
    with torch.device("meta"):
        assert stage_plan._turbo_bytes.__wrapped__(*sizes) == stage_plan._turbo_bytes(*sizes)


def test_what_does_not_fit_is_cut_up_and_still_counted():
    tight = plan(work(precision="fp8", **SMALL), int(16.2 * GIB))
    assert tight.fits and tight.layers_on_device is None
    small = plan(work(precision="fp8"), int(7.2 * GIB))
    assert not small.fits and small.placement == "sequential"
    peaks = {stage.name: stage.peak_bytes for stage in small.stages}
    assert small.layers_on_device == 18
    assert peaks["text"] <= 7.2 * GIB < peaks["text"] + stage_plan.TEXT_LAYER_BYTES
    assert small.tiles == 2 and peaks["decode video"] <= 7.2 * GIB
    assert small.history_on_host
    whole = plan(work(precision="fp8"), None)
    floor = {stage.name: stage.floor_s for stage in whole.stages}["decode video"]
    assert {stage.name: stage.floor_s for stage in small.stages}["decode video"] > 1.2 * floor
    assert plan(work(precision="fp8", decoder="wan"), 2**20).layers_on_device == 0


def test_a_placement_can_be_asked_for():
    forced = plan(work(precision="fp8"), card(24), "resident")
    assert forced.placement == "resident" and not forced.fits
    assert plan(work(precision="fp8"), card(80), "sequential").placement == "sequential"
    assert plan(work(precision="fp8"), None).placement == "resident"


CODECS, MODELS = ("image_encoder", "audio_decoder", "video_decoder"), ("distill", "1080p_sr")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5, 15])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_as_many_parts_stay_as_fit(seconds, precision):
    found = {gb: plan(work(seconds, precision=precision), card(gb)) for gb in (24, 32, 48, 80)}
    assert all(one.fits and one.peak_bytes <= card(gb) for gb, one in found.items())
    assert found[24].kept == (CODECS if seconds == 5 else ()) and found[32].kept == CODECS
    assert set(found[48].kept) == {*CODECS, *MODELS} and found[48].placement == "mixed"
    assert found[80].placement == "resident" and found[80].layers_on_device is None
    # In what the two models leave, with the workspaces, all but seven layers of the text encoder and one that is read.
    assert found[48].layers_on_device == 35
    beside = card(48) - memory_plan.WORKSPACE_BYTES - found[48].peak_bytes
    assert 0 <= beside < stage_plan.TEXT_LAYER_BYTES


@pytest.mark.slow
def test_the_text_encoder_stays_after_the_models_have_their_place():
    bf16 = plan(work(precision="bf16"), card(80))
    assert set(bf16.kept) == {*CODECS, *MODELS} and bf16.layers_on_device == 38
    alone = plan(work(precision="bf16", **SMALL), card(48))
    assert "distill" in alone.kept and "text_encoder" not in alone.kept


def test_the_peak_is_of_what_stays_and_the_largest_stage_beside_it():
    stages = (StagePlan("a", "x", 5, 7, 1.0), StagePlan("b", "y", 3, 11, 1.0), StagePlan("c", "x", 5, 6, 0.5))
    found = PipelinePlan(stages, ("x", "y"), 1, None, False, 16)
    assert (found.resident_bytes, found.sequential_bytes, found.floor_s) == (5 + 3 + 8, 11, 2.5)
    assert found.fits and not dataclasses.replace(found, budget_bytes=15).fits
    assert dataclasses.replace(found, kept=(), budget_bytes=15).fits
    assert dataclasses.replace(found, kept=("y",)).peak_bytes == 11
    names = [dataclasses.replace(found, kept=kept).placement for kept in ((), ("x",), ("x", "y"))]
    assert names == ["sequential", "mixed", "resident"]


def test_one_stage_a_sound_and_the_other_decoder():
    found = plan(work(stages=1, resolution="540p", sound=True, decoder="wan"), None)
    assert [stage.name for stage in found.stages] == [
        "text", "image", "sound", "denoise", "decode audio", "decode video"
    ]  # fmt: skip
    base = plan(work(first="base"), None)
    floors = [{stage.name: stage.floor_s for stage in one.stages}["denoise"] for one in (base, plan(work(), None))]
    assert floors[0] == pytest.approx(8 * floors[1])  # 32 steps of two evaluations for 8 of one


@pytest.mark.parametrize("mode", ["distilled", "base"])
def test_latents_beside_the_models_input_are_those_that_a_run_holds(mode):
    meter, held = StorageMeter(), []

    class Metered:
        config, device, stream_dtype = ModelConfig.preset("tiny"), torch.device("cpu"), torch.float32

        def __call__(self, video, audio, text):
            held.append(meter.live_bytes / video.nbytes - 1)
            return torch.tanh(video), torch.sin(audio)

    start = torch.randn(1, 48, 4, 64, 64), torch.randn(1, 3, 64), torch.randn(1, 3, 96)
    guidance = {"guidance": 5.0, "null_text": torch.randn(1, 3, 96), "steps": 5} if mode == "base" else {}
    with meter:
        meter.register(start, "start")
        sample(Metered(), *start, image=torch.randn(1, 48, 1, 64, 64), progress=False, **guidance)
    assert round(max(held)) == stage_plan.HELD_LATENTS[mode]


def test_the_turbo_decoders_trace_is_of_its_largest_window_and_tile(monkeypatch):
    traced = []
    monkeypatch.setattr(stage_plan.TurboDecoder, "_window", lambda self, latents, *how: traced.append(how))
    stage_plan._turbo_bytes.__wrapped__(32, 68, 120, 9)
    ((window, (tile,)),) = traced
    assert window.stop - window.start == 9
    grid = tiling.space_tiles(68, 120, 9)
    sizes = [tiling.positions(one) for one in grid]
    assert tiling.positions(tile) == max(sizes) > sizes[0]  # one in the middle has halos on both sides


def test_a_cpu_has_no_budget():
    assert budget_of(torch.device("cpu")) is None


def traced(build, run, dtype):
    """(weights, peak beside them) of a library's part under fake tensors."""
    meter = StorageMeter()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.no_grad():
            model = build()
            weights = meter.register((*model.parameters(), *model.buffers()), "weights")
            with meter:
                run(model)
    finally:
        torch.set_default_dtype(torch.float32)
    return weights, meter.peak_bytes - weights


def test_factors_of_the_text_encoder():
    from transformers import AttentionInterface, AttentionMaskInterface, T5GemmaConfig, T5GemmaEncoderModel

    AttentionInterface.register("traced", AttentionInterface()["sdpa"])
    AttentionMaskInterface.register("traced", AttentionMaskInterface()["sdpa"])
    half = {
        "vocab_size": 8, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 2, "attn_logit_softcapping": None,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    config = T5GemmaConfig(encoder=half, decoder=half, vocab_size=8, is_encoder_decoder=False)

    def build():
        model = T5GemmaEncoderModel(config).eval()
        model.encoder.set_attn_implementation("traced")
        return model.encoder

    def run(model):
        rows, mask = torch.empty(1, 640, 3584), torch.ones(1, 640, dtype=torch.long)
        model(inputs_embeds=rows, attention_mask=mask)

    weights, rest = traced(build, run, torch.bfloat16)
    layers = 2 * stage_plan.TEXT_LAYER_BYTES
    assert 0 < weights - layers < 2**20  # the last norm, and an embedding of 8 rows
    assert 0.9 < rest / 640 / stage_plan.TEXT_ROW_BYTES <= 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_factors_of_the_codecs():
    from diffusers import AutoencoderKLWan, AutoencoderOobleck

    def wan(*, without):
        model = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
            temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, scale_factor_temporal=4,
        )  # fmt: skip
        setattr(model, without, None)
        return model

    def oobleck(*, without):
        model = AutoencoderOobleck()
        setattr(model, without, None)
        return model

    pixels = 256 * 448
    picture, latents = torch.empty(1, 3, 1, 256, 448), torch.empty(1, 48, 3, 16, 28)
    for build, run, dtype, weights, rest in (
        (
            lambda: wan(without="decoder"),
            lambda model: model.encode(torch.empty(picture.shape)).latent_dist.mean,
            torch.bfloat16,
            stage_plan.WAN_ENCODER_BYTES,
            stage_plan.WAN_ENCODER_PIXEL * pixels,
        ),
        (
            lambda: wan(without="encoder"),
            lambda model: model.decode(torch.empty(latents.shape)).sample,
            torch.bfloat16,
            stage_plan.WAN_DECODER_BYTES,
            stage_plan.WAN_DECODER_PIXEL * pixels,
        ),
        (
            lambda: oobleck(without="encoder"),
            lambda model: model.decode(torch.empty(1, 64, 376)).sample,
            torch.float32,
            stage_plan.AUDIO_HALF_BYTES,
            stage_plan.AUDIO_HALF_BYTES + stage_plan.AUDIO_DECODER_LATENT * 376,
        ),
        (
            lambda: oobleck(without="decoder"),
            lambda model: model.encode(torch.empty(1, 2, 375 * 2048)).latent_dist.mode(),
            torch.float32,
            stage_plan.AUDIO_HALF_BYTES,
            stage_plan.AUDIO_ENCODER_LATENT * 375,
        ),
    ):
        found = traced(build, run, dtype)
        assert 0.97 < found[0] / weights <= 1.001
        assert 0.95 < found[1] / rest <= 1.001
