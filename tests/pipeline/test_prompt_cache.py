"""Embeddings on disk: found again, by nothing but the same model and prompt, and made again where damaged."""

import hashlib
import os
import shutil
import stat

import pytest
import torch
from logged import logs
from safetensors.torch import load_file, save_file

from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.ops.runtime.cache_folder import CACHE_VARIABLE
from happyhorse_fast.pipeline import prompt_cache
from happyhorse_fast.pipeline import tiny as tiny_module
from happyhorse_fast.pipeline.negative_prompt import NEGATIVE_PROMPT
from happyhorse_fast.pipeline.prompt_cache import PromptCache, encoder_digest
from happyhorse_fast.pipeline.text import TextEncoder

EMBEDDING = (torch.arange(3 * 96).view(1, 3, 96) / 7).half().float()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where embeddings are kept."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(prompt_cache.SWITCH, raising=False)
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def cache(tiny):
    return PromptCache(tiny / tiny_module.TEXT_FOLDER)


def test_an_embedding_comes_back_bit_for_bit(tiny, cache, folder):
    assert cache.get("a pony") is None
    made = TextEncoder.load(tiny / tiny_module.TEXT_FOLDER).encode("a pony")
    cache.put("a pony", made)
    found = PromptCache(tiny / tiny_module.TEXT_FOLDER).get("a pony")
    assert found.dtype == torch.float32 and torch.equal(found, made)
    assert cache.get("a pony ") is None and cache.get("A pony") is None
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"pony" not in file.read_bytes() and "pony" not in file.name


def test_odd_prompts_have_names_too(cache):
    for number, prompt in enumerate(("\ud83d", "\0", "../../x", "x" * 100_000)):
        cache.put(prompt, EMBEDDING + number)
        assert torch.equal(cache.get(prompt), (EMBEDDING + number).half().float())


def spoil(file):
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("model.encoder.layers.1.mlp"))
    tensors[key] = tensors[key] * 2
    save_file(tensors, file)


CHANGES = {
    "config": lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("50.0", "51.0")),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + "\n"),
    "weights": lambda f: spoil(f / "model-00002-of-00004.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_other_embeddings(tiny, tmp_path, change):
    other = shutil.copytree(tiny / tiny_module.TEXT_FOLDER, tmp_path / "text")
    before = encoder_digest(other, torch.bfloat16)
    assert before == encoder_digest(tiny / tiny_module.TEXT_FOLDER, torch.bfloat16)
    CHANGES[change](other)
    assert encoder_digest(other, torch.bfloat16) != before


def test_another_dtype_and_soft_cap_have_other_embeddings(tiny, monkeypatch):
    place = tiny / tiny_module.TEXT_FOLDER
    digests = {encoder_digest(place, dtype) for dtype in (torch.bfloat16, torch.float32)}
    monkeypatch.setattr(prompt_cache, "ATTENTION", "with_soft_cap")
    assert len(digests | {encoder_digest(place, torch.bfloat16)}) == 3


def cut(file):
    file.write_bytes(file.read_bytes()[:-4])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def of_another_dtype(file):
    save_file({"embedding": EMBEDDING}, file)


def of_another_key(file):
    save_file({"other": EMBEDDING.half()}, file)


def without_a_digest(file):
    save_file({"embedding": EMBEDDING.half()}, file)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, of_another_dtype, of_another_key, without_a_digest])
def test_a_damaged_entry_is_reported_and_made_again(cache, folder, damage):
    cache.put("a pony", EMBEDDING)
    (file,) = folder.iterdir()
    damage(file)
    with logs(r"\.safetensors cannot be used, the prompt is encoded again: ") as caught:
        assert cache.get("a pony") is None
    assert len(caught) == 1
    cache.put("a pony", EMBEDDING)
    assert torch.equal(cache.get("a pony"), EMBEDDING)


def test_a_folder_that_cannot_be_used_costs_a_warning(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with logs("the prompt cache cannot be used, the prompt is encoded again"):
        assert cache.get("a pony") is None
    with logs("the embedding of a prompt cannot be kept"):
        cache.put("a pony", EMBEDDING)


def test_a_full_disk_leaves_nothing(cache, folder, monkeypatch):
    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache, "write_safetensors", full)
    with logs("cannot be kept: .*No space left"):
        cache.put("a pony", EMBEDDING)
    assert list(folder.iterdir()) == []


def test_the_switch_keeps_nothing(cache, folder, monkeypatch):
    cache.put("a pony", EMBEDDING)
    monkeypatch.setenv(prompt_cache.SWITCH, "0")
    assert cache.get("a pony") is None
    cache.put("another", EMBEDDING)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setenv(prompt_cache.SWITCH, "1")
    assert torch.equal(cache.get("a pony"), EMBEDDING)


def test_those_longest_unused_are_forgotten(cache, folder, monkeypatch):
    monkeypatch.setattr(prompt_cache, "MOST_ENTRIES", 2)
    for age, prompt in enumerate(("first", "second")):
        cache.put(prompt, EMBEDDING)
        os.utime(cache._file(prompt), (age + 1, age + 1))
    assert cache.get("first") is not None  # used again, just now
    cache.put("third", EMBEDDING)
    kept = {prompt: cache.get(prompt) is not None for prompt in ("first", "second", "third")}
    assert kept == {"first": True, "second": False, "third": True}


def test_a_folder_without_an_encoder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder of a text encoder"):
        PromptCache(tmp_path / "none")


def test_the_negative_prompt_is_our_own_and_fits():
    assert not hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest().startswith("4515a21f8d12")
    assert 100 < len(NEGATIVE_PROMPT.split()) < 200
