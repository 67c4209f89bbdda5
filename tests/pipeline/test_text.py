"""The text encoder against what transformers 4.56.0, which the public implementation pins, gave for these weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, T5GemmaEncoderModel

from happyhorse_fast import optional
from happyhorse_fast.arguments import CheckpointError, NonFiniteError
from happyhorse_fast.pipeline import tiny as tiny_module
from happyhorse_fast.pipeline.text import TextEncoder, text_files, tokens_of

RECORDED = load_file(Path(__file__).parent / "t5gemma_tiny_456.safetensors")
PROMPT = 'A pony gallops; <Anna, English>: "Faster!"\nBackground Sound: <hooves>\u00e9\U0001f40e'
KEY = "layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny, tmp_path):
    """A text encoder of one's own, to damage."""
    return shutil.copytree(tiny / tiny_module.TEXT_FOLDER, tmp_path / "text")


@pytest.fixture
def recorded(folder):
    """The folder with the recorded weights, in float32 and in one file."""
    for file in folder.glob("model*"):
        file.unlink()
    weights = {f"model.{key.removeprefix('weight.')}": value for key, value in RECORDED.items() if "weight." in key}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


def hidden(encoder, numbers):
    """The last hidden state of token numbers."""
    with torch.no_grad():
        mask = torch.ones(1, len(numbers), dtype=torch.long)
        return encoder.module(inputs_embeds=encoder._rows(numbers)[None], attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("layers", [None, 0, 1, 9])
def test_the_hidden_state_is_the_recorded_one_wherever_the_layers_are(recorded, layers):
    encoder = TextEncoder.load(recorded, dtype=torch.float32, layers_on_device=layers)
    found = hidden(encoder, RECORDED["in.ids"].tolist())[0]
    torch.testing.assert_close(found, RECORDED["out.sdpa"], rtol=1e-5, atol=1e-5)
    assert (found - RECORDED["out.eager"]).abs().max() > 1  # which has the soft cap


def test_the_recorded_state_with_a_soft_cap_is_what_the_library_would_give(recorded):
    encoder = TextEncoder.load(recorded, dtype=torch.float32)
    encoder.module.encoder.set_attn_implementation("eager")
    for layer in encoder.module.encoder.layers:
        assert layer.self_attn.attn_logit_softcapping is None
        layer.self_attn.attn_logit_softcapping = 50.0
    found = hidden(encoder, RECORDED["in.ids"].tolist())[0]
    torch.testing.assert_close(found, RECORDED["out.eager"], rtol=1e-5, atol=2e-5)


def test_an_embedding_is_that_of_the_library_rounded_to_float16(tiny):
    folder = tiny / tiny_module.TEXT_FOLDER
    encoder = TextEncoder.load(folder)
    found = encoder.encode(PROMPT)
    bos, *numbers = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    assert bos == 2 and tokens_of(encoder.tokenizer, PROMPT) == numbers
    assert found.shape == (1, len(numbers), 96) and found.dtype == torch.float32
    assert torch.equal(found, found.half().float()) and torch.equal(found, found.bfloat16().float()) is not False
    library = T5GemmaEncoderModel.from_pretrained(folder, is_encoder_decoder=False, dtype=torch.bfloat16)
    library.encoder.config.attn_logit_softcapping = None
    for layer in library.encoder.layers:
        layer.self_attn.attn_logit_softcapping = None
    with torch.no_grad():
        state = library.eval()(torch.tensor([numbers])).last_hidden_state
    assert (found - state.float()).norm() / state.float().norm() < 1e-2


def test_a_tokenizer_that_cuts_and_pads_does_neither(folder):
    file = folder / "tokenizer.json"
    before = tokens_of(TextEncoder.load(folder).tokenizer, PROMPT)
    settings = json.loads(file.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    file.write_text(json.dumps(settings))
    assert tokens_of(TextEncoder.load(folder).tokenizer, PROMPT) == before


@pytest.mark.parametrize("layers", [0, 1])
def test_streamed_layers_give_the_same_bits_and_leave_nothing_behind(tiny, layers):
    folder = tiny / tiny_module.TEXT_FOLDER
    whole, streamed = TextEncoder.load(folder), TextEncoder.load(folder, layers_on_device=layers)
    for prompt in (PROMPT, "twice, " * 200):
        assert torch.equal(whole.encode(prompt), streamed.encode(prompt))
    left = [key for key, value in streamed.module.encoder.layers.named_parameters() if not value.is_meta]
    assert {key.partition(".")[0] for key in left} == {str(number) for number in range(layers)}
    assert whole.module.encoder.embed_tokens.weight.is_meta


def test_a_streamed_layer_is_forgotten_where_it_fails(tiny, monkeypatch):
    encoder = TextEncoder.load(tiny / tiny_module.TEXT_FOLDER, layers_on_device=0)
    layer = encoder.module.encoder.layers[1]

    def interrupted(*arguments):
        assert not layer.mlp.up_proj.weight.is_meta
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.mlp, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(PROMPT)
    assert all(value.is_meta for value in layer.parameters())


def test_rows_beyond_640_are_cut_off_after_encoding(tiny):
    encoder = TextEncoder.load(tiny / tiny_module.TEXT_FOLDER)
    long = "abcdefg" * 100
    assert len(tokens_of(encoder.tokenizer, long)) == 700
    found, short = encoder.encode(long), encoder.encode(long[:640])
    assert found.shape == short.shape == (1, 640, 96)
    assert not torch.equal(found, short)


def test_no_prompt_is_an_error(tiny):
    encoder = TextEncoder.load(tiny / tiny_module.TEXT_FOLDER)
    with pytest.raises(ValueError, match="prompt must have at least one token, got ''"):
        encoder.encode("")
    with pytest.raises(ValueError, match=r"prompt must be Unicode, got '\\ud83d' in it"):
        encoder.encode("half a horse: \ud83d")
    with pytest.raises(TypeError, match="prompt must be text, got int"):
        encoder.encode(3)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_found_out(folder):
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    rows = len(settings["model"]["vocab"])
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": rows, "content": "<image>"})
    file.write_text(json.dumps(settings))
    encoder = TextEncoder.load(folder)
    assert encoder.encode("a pony").shape[1] > 1
    with pytest.raises(
        CheckpointError, match=f"has {rows} rows, the tokenizer gives token {rows}: .* different models"
    ):
        encoder.encode("an <image>")


def test_numbers_beyond_float16_are_an_error(tiny, monkeypatch):
    encoder = TextEncoder.load(tiny / tiny_module.TEXT_FOLDER)
    nn.init.constant_(encoder.module.encoder.norm.weight, 1e6)
    with pytest.raises(NonFiniteError, match="embedding of the prompt must be finite"):
        encoder.encode(PROMPT)


def test_the_files_that_are_needed_leave_out_those_of_the_decoder(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    of_encoder = {name for key, name in index.items() if key.startswith("model.encoder.")}
    others = set(index.values()) - of_encoder
    assert others, "the decoder must have a shard of its own, or nothing is shown"
    whole = TextEncoder.load(folder).encode(PROMPT)
    for name in others:
        (folder / name).unlink()
    assert {file.name for file in text_files(folder) if "-of-" in file.name} == of_encoder
    assert torch.equal(TextEncoder.load(folder).encode(PROMPT), whole)


def test_an_encoder_saved_alone_is_taken(folder):
    library = T5GemmaEncoderModel.from_pretrained(folder, is_encoder_decoder=False, dtype=torch.bfloat16)
    whole = TextEncoder.load(folder).encode(PROMPT)
    for file in folder.glob("model*"):
        file.unlink()
    library.save_pretrained(folder)
    assert torch.equal(TextEncoder.load(folder).encode(PROMPT), whole)


def test_rotary_frequencies_of_an_older_configuration(folder):
    whole = TextEncoder.load(folder).encode(PROMPT)
    settings = json.loads((folder / "config.json").read_text())
    for half in (settings["encoder"], settings["decoder"]):
        half["rope_theta"] = half.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert torch.equal(TextEncoder.load(folder).encode(PROMPT), whole)


def edit(folder, change):
    """Change the tensors of the shard that holds the key."""
    index = json.loads((folder / INDEX).read_text())
    name = index["weight_map"][f"model.encoder.{KEY}"]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def rename(tensors):
    tensors["model.encoder.layers.1.mlp.foreign.weight"] = tensors.pop(f"model.encoder.{KEY}")


def reshape(tensors):
    tensors[f"model.encoder.{KEY}"] = tensors[f"model.encoder.{KEY}"][:-1].contiguous()


def integers(tensors):
    tensors[f"model.encoder.{KEY}"] = tensors[f"model.encoder.{KEY}"].to(torch.int8)


def reindex(folder, change):
    file = folder / INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "needs config.json, which is not there"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "needs tokenizer.json, which is not there"),
    "no weights": (lambda f: (f / INDEX).unlink(), "needs model.safetensors, which is not there"),
    "config cut": (lambda f: (f / "config.json").write_text('{"a'), "config.json: cannot be read as JSON"),
    "config of another": (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'), "'t5gemma'.*got 't5'"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object, got list"),
    "config without layers": (
        lambda f: (f / "config.json").write_text('{"model_type": "t5gemma", "encoder": {"num_hidden_layers": "x"}}'),
        "transformers makes no encoder of it",
    ),
    "tokenizer cut": (
        lambda f: (f / "tokenizer.json").write_text('{"a'),
        "tokenizer.json: no tokenizer can be made of it",
    ),
    "index cut": (lambda f: (f / INDEX).write_text("{"), "corrupt index"),
    "index of a decoder": (
        lambda f: reindex(f, lambda m: [m.pop(key) for key in list(m) if "encoder" in key]),
        r"names no tensor of an encoder, model.encoder.\* or encoder.\*",
    ),
    "index misses a key": (
        lambda f: reindex(f, lambda m: m.pop(f"model.encoder.{KEY}")),
        f"does not name tensors that are there: model.encoder.{KEY}",
    ),
    "key not in its shard": (
        lambda f: edit(f, rename),
        f"names tensors that are not there: model.encoder.{KEY} in model-0000",
    ),
    "misshapen": (lambda f: edit(f, reshape), rf"text encoder: {KEY} must be \[192, 96\], got \[191, 96\]"),
    "integers": (lambda f: edit(f, integers), f"text encoder: {KEY} must be of floating point, got I8"),
    "shard cut": (
        lambda f: (f / "model-00002-of-00004.safetensors").write_bytes(
            (f / "model-00002-of-00004.safetensors").read_bytes()[:-5]
        ),
        "model-00002-of-00004.safetensors: truncated",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_before_weights_are_read(folder, fault):
    damage, message = FAULTS[fault]
    TextEncoder.check(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        TextEncoder.check(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_and_an_unknown_tensor_are_named(folder):
    edit(folder, rename)

    def follow(names):
        names["model.encoder.layers.1.mlp.foreign.weight"] = names.pop(f"model.encoder.{KEY}")

    reindex(folder, follow)
    with pytest.raises(
        CheckpointError, match=f"layers.1.mlp.foreign.weight is none of the encoder's; {KEY} is missing"
    ):
        TextEncoder.check(folder)


def test_not_a_number_in_a_tensor_is_found_while_it_is_read(folder):
    def spoil(tensors):
        tensors[f"model.encoder.{KEY}"][0, 0] = float("nan")

    edit(folder, spoil)
    with pytest.raises(CheckpointError, match="holds 1 NaN or Inf"):
        TextEncoder.load(folder)
    with pytest.raises(CheckpointError, match="holds 1 NaN or Inf"):
        TextEncoder.load(folder, layers_on_device=0).encode(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float64}, ValueError, "dtype must be"),
        ({"layers_on_device": -1}, ValueError, "layers_on_device must be at least 0"),
        ({"layers_on_device": 0.5}, TypeError, "layers_on_device must be an integer"),
        ({"device": "meta"}, ValueError, "device must be one that holds data"),
    ],
)
def test_wrong_arguments(tiny, arguments, error, message):
    with pytest.raises(error, match=message):
        TextEncoder.load(tiny / tiny_module.TEXT_FOLDER, **arguments)


def test_another_version_of_the_library_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.56.0")
    with pytest.raises(ImportError, match=r"the text encoder needs transformers: transformers is of version 4\.56\.0"):
        TextEncoder.check(tiny / tiny_module.TEXT_FOLDER)
    monkeypatch.setattr(optional, "obstacle", lambda package: f"{package} is not installed")
    with pytest.raises(ImportError, match="the text encoder needs transformers: transformers is not installed"):
        TextEncoder.load(tiny / tiny_module.TEXT_FOLDER)


def test_the_library_says_nothing_on_the_way(tiny, capfd, caplog):
    TextEncoder.load(tiny / tiny_module.TEXT_FOLDER).encode(PROMPT)
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder of a text encoder"):
        text_files(tmp_path / "none")
