"""A tiny checkpoint of random weights: every part of the whole path, in the layout in which the parts are published.

It makes noise, not pictures; what it shows is that everything fits together, in seconds and on a CPU. The libraries of
the extra ``pipeline`` write the parts that are theirs.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from happyhorse_fast import ambient, optional
from happyhorse_fast.checkpoint.save import save_checkpoint, write_checkpoint
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.sizes import BANDS_KEY
from happyhorse_fast.files import replacing, require_folder
from happyhorse_fast.pipeline.layout import DEFAULTS, NOTE, PARTS
from happyhorse_fast.pipeline.turbo import LATENT_MEAN, LATENT_STD, TurboDecoder
from happyhorse_fast.pipeline.turbo_file import EMA, SETTINGS, SETTINGS_FILE, WEIGHTS_FILE

TEXT_FOLDER, VIDEO_FOLDER, AUDIO_FOLDER, TURBO_FOLDER = (
    PARTS[name].places[0] for name in ("text_encoder", "video_vae", "audio_vae", "turbo_vae")
)

_DENSE = ModelConfig(
    num_layers=3,
    hidden_size=64,
    head_dim=32,
    num_heads_q=4,
    num_heads_kv=2,
    text_in_channels=96,
    mm_layers=(0, 2),
    gelu7_layers=(0,),
)
MODELS = {
    "base": _DENSE,
    "distill": _DENSE,
    "540p_sr": _DENSE.replace(coords_style="v1"),
    "1080p_sr": _DENSE.replace(coords_style="v1", local_attn_layers=(0, 1), frame_receptive_field=2),
}
"""Folder -> configuration; 1.1 M parameters each. ``base`` is stored in bf16, the others in float32, as published."""
QUICK = {"seconds": 3, "resolution": "540p"}
"""Defaults of the command line: both stages in a minute on two cores."""
_SHARD_BYTES = 1_000_000
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


@ambient.makes_tensors
def write_tiny_checkpoint(folder: str | Path, seed: int = 0) -> None:
    """Write the checkpoint: 16 MB, in seconds; the same ``seed`` gives the same weights.

    Args:
        folder: Where to; made where it does not exist. Files of these names that are there are replaced.
        seed: Of the weights.

    Raises:
        ImportError: transformers or diffusers is missing or of another version.
        OSError: ``folder`` is a file, or cannot be written to.
    """
    for library in ("transformers", "diffusers"):
        optional.require(library, "a tiny checkpoint")
    root = Path(folder)
    require_folder(root)
    with torch.random.fork_rng(devices=[]):
        for place, part in enumerate((_write_models, _write_text, _write_video, _write_audio, _write_turbo)):
            torch.manual_seed(seed * 5 + place)
            part(root)
    note: dict[str, Any] = {name: {"config": config.to_dict()} for name, config in MODELS.items()}
    note[DEFAULTS] = QUICK
    _write_json(root / NOTE, note)


def _write_models(root: Path) -> None:
    for name, config in MODELS.items():
        seed = int(torch.randint(2**31, ()))
        weights = HappyHorse(config, torch.float32).init_weights(seed).state_dict()
        dtype = torch.bfloat16 if name == "base" else torch.float32
        weights = {key: value.to(dtype) for key, value in weights.items() if key != BANDS_KEY}
        save_checkpoint(weights, root / name, max_shard_bytes=_SHARD_BYTES, overwrite=True)


def _write_text(root: Path) -> None:
    """Hidden size 96, two layers, a soft cap; words split into letters and bytes; shards as the published ones."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    names = dict.fromkeys([*_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    vocabulary = {name: number for number, name in enumerate(names)}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", "\u2581")
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    # As in the published file, whose settings below say that there is none: libraries differ in which they obey.
    words.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", vocabulary["<bos>"])])
    words.add_special_tokens(list(_SPECIAL_TOKENS))
    half: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    encoder = {**half, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    decoder = {**half, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=len(vocabulary)))
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.bfloat16
    weights = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items() if key.startswith("model.")}
    folder = root / TEXT_FOLDER
    beside = {"config.json": model.config.to_json_string()}
    write_checkpoint(weights, folder, beside, max_shard_bytes=150_000, overwrite=True)
    words.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "tokenizer_class": "GemmaTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_video(root: Path) -> None:
    """The published strides, latent channels, means and deviations; 4 and 8 channels in place of 160 and 256."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    ).save_pretrained(root / VIDEO_FOLDER)


def _write_audio(root: Path) -> None:
    """The published strides, in float16, for the encoder is as wide as its output, 2 x 64: 5.8 of 16.2 MB."""
    from diffusers import AutoencoderOobleck

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated")
        codec = AutoencoderOobleck(encoder_hidden_size=128, channel_multiples=[1, 1, 1, 1, 1], decoder_channels=8)
        codec.half().save_pretrained(root / AUDIO_FOLDER)


def _write_turbo(root: Path) -> None:
    """The published depths and windows, few channels; lists are in the order of the encoder, so the other way round."""
    channels, depths = [8, 8, 16, 16], [2, 2, 2, 3, 3]
    empty = TurboDecoder([channels[-1], *reversed(channels)], depths[::-1]).state_dict()
    weights = {  # of outputs as large as the inputs, as He et al. 2015 have it
        key: torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else torch.zeros(value.shape)
        for key, value in empty.items()
    }
    settings = SETTINGS | {"decoder_block_out_channels": channels, "decoder_layers_per_block": depths}
    folder = root / TURBO_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / SETTINGS_FILE, settings)
    # Into a stream: with a name, torch would store that of the partial file.
    with replacing(folder / WEIGHTS_FILE) as file, file.open("wb") as stream:
        torch.save({EMA: {f"module.{key}": value for key, value in weights.items()}}, stream)


def _write_json(file: Path, content: object) -> None:
    with replacing(file) as made:
        made.write_text(json.dumps(content, indent=2) + "\n")
