"""Checkpoints: what is written is what is loaded, in one copy, and an interrupted save or load leaves nothing."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from toy_checkpoint import (
    BANDS,
    CONFIG,
    INDEX,
    QKV,
    edit_file,
    fails,
    index_of,
    read_sizes,
    shard_of,
    weights,
)

from happyhorse_fast import golden
from happyhorse_fast.arguments import CheckpointError
from happyhorse_fast.checkpoint import stream as streaming
from happyhorse_fast.checkpoint.header import TensorEntry, read_headers
from happyhorse_fast.checkpoint.load import load, save_checkpoint
from happyhorse_fast.cli.output import save_tensors
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.eager.model import HappyHorse
from happyhorse_fast.eager.rotary import frequency_bands
from happyhorse_fast.eager.sizes import WITNESS

# What is written is what is loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 5 << 30], ids=["sharded", "single"])
@pytest.mark.parametrize("name", [n for n in golden.names() if n.endswith("fp32") and not n.startswith("sr_")])
def test_golden_velocities(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    case = golden.load_case(name)
    save_checkpoint(case.state_dict(), tmp_path, max_shard_bytes=max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or max_shard_bytes == 1 << 20
    assert (tmp_path / INDEX).exists() == (max_shard_bytes == 1 << 20)
    model = load(tmp_path, config=case.config, compute_dtype=torch.float32, progress=False)
    t = case.tensors
    with torch.no_grad():
        outputs = model(t["in.video"], t["in.audio"], t["in.text"])
    for modality, value in zip(("video", "audio"), outputs, strict=True):
        expected = t[f"out.{modality}"].double()
        error = float((value.double() - expected).norm() / expected.norm())
        assert error <= 1e-5, f"{modality}: measured {error:.2e}"


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_layers = draw(st.integers(1, 4))
    kv = draw(st.integers(1, 3))
    lists = {
        name: draw(st.lists(st.integers(0, num_layers - 1), unique=True))
        for name in ("mm_layers", "gelu7_layers", "post_norm_layers")
    }
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=draw(st.integers(2, 24)),
        head_dim=8 * draw(st.integers(1, 3)),
        num_heads_q=kv * draw(st.integers(1, 3)),
        num_heads_kv=kv,
        video_in_channels=4 * draw(st.integers(1, 4)),
        audio_in_channels=draw(st.integers(1, 9)),
        text_in_channels=draw(st.integers(1, 9)),
        **lists,  # type: ignore[arg-type]
    )


@examples(40)
@given(config=configs(), max_shard_bytes=st.integers(1, 100_000))
def test_round_trip_of_any_model(config: ModelConfig, max_shard_bytes: int) -> None:
    model = HappyHorse(config).init_weights(3)
    with tempfile.TemporaryDirectory() as name:
        save_checkpoint(model, name, max_shard_bytes=max_shard_bytes)
        assert read_sizes(name) == {field: getattr(config, field) for field in WITNESS}
        loaded = load(name, config=config, progress=False)
    expected, state = model.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cast_to_the_models_dtypes_in_pieces(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STAGING_BYTES", 24)
    state = {key: value if key == BANDS else value.to(stored) for key, value in weights().items()}
    save_checkpoint(state, tmp_path)
    loaded = load(tmp_path, config=CONFIG, progress=False).state_dict()
    for key, like in HappyHorse(CONFIG, device="meta").state_dict().items():
        assert loaded[key].dtype == like.dtype, key
        assert torch.equal(loaded[key], state[key].to(like.dtype)), key


def test_presets_are_taken(tmp_path: Path) -> None:
    save_checkpoint(HappyHorse(ModelConfig.preset("tiny")), tmp_path)
    model = load(tmp_path, "tiny", compute_dtype=torch.float64, progress=False)
    assert model.config == ModelConfig.preset("tiny") and model.compute_dtype == torch.float64


def test_rotary_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = weights()
    bands = state.pop(BANDS)
    save_checkpoint(state, tmp_path / "absent")
    assert torch.equal(load(tmp_path / "absent", config=CONFIG, progress=False).adapter.rope.bands, bands)
    config = CONFIG.replace(head_dim=32)
    state = weights(config)
    state[BANDS] *= 1 + torch.tensor([5e-7, 0, 0, -5e-7])
    save_checkpoint(state, tmp_path / "close")
    assert torch.equal(load(tmp_path / "close", config=config, progress=False).adapter.rope.bands, state[BANDS])
    assert not torch.equal(state[BANDS], frequency_bands(32))
    state[BANDS][3] *= 1 + 2e-6
    save_checkpoint(state, tmp_path / "other")
    read: list[str] = []
    read_tensor = streaming.TensorReader.read

    def recorded(reader: streaming.TensorReader, file: io.FileIO, entry: TensorEntry, *arguments: Any) -> torch.Tensor:
        read.append(entry.key)
        return read_tensor(reader, file, entry, *arguments)

    monkeypatch.setattr(streaming.TensorReader, "read", recorded)
    fails(tmp_path / "other", "model.safetensors", BANDS, "rotary frequencies", config=config)
    assert BANDS in read and not any("layers" in key for key in read), "61 GB later it would be no less wrong"


def test_progress_bar_only_where_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder, config=CONFIG)
    shown = capsys.readouterr()
    assert "100" in shown.err or "/s" in shown.err
    assert not shown.out
    load(folder, config=CONFIG, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_header_whose_length_looks_like_a_pickle(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a.key": entry}).encode().ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    assert read_headers(file)["a.key"].start == 8 + length


# Memory --------------------------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Counts the bytes of every live storage that is made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def live(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result


@pytest.fixture
def storages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storages]:
    monkeypatch.setattr(streaming, "STAGING_BYTES", 4096)
    with Storages() as mode:
        yield mode


def test_never_two_copies_of_a_weight(tmp_path: Path, storages: Storages) -> None:
    config = golden.load_case("dense_v2_fp32").config
    # float32 on disk: most of it is cast on the way.
    state = {key: value.float() for key, value in golden.recipe_weights(config, 1).items()}
    save_checkpoint(state, tmp_path, max_shard_bytes=1 << 20)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) >= 10
    del state
    before, storages.peak = storages.live, 0
    tracemalloc.start()
    try:
        model = load(tmp_path, config=config, progress=False)
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sizes = [value.nbytes for value in model.state_dict().values()]
    assert storages.live - before == sum(sizes)  # the tracker sees every weight, and nothing else is left
    extra = storages.peak - before - sum(sizes)
    assert extra <= 4096 + 1024, f"{extra} bytes beside {sum(sizes)} of weights; the largest weight has {max(sizes)}"
    assert python_peak < max(sizes), f"{python_peak} bytes of Python objects, the largest weight has {max(sizes)}"
    del model
    assert storages.live == before


@pytest.mark.parametrize("interruption", [None, KeyboardInterrupt, MemoryError])
def test_nothing_is_kept_after_an_error(
    interruption: type[BaseException] | None, folder: Path, storages: Storages, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = f"block.layers.{CONFIG.num_layers - 1}.mlp.down_proj.weight"
    if interruption is None:
        edit_file(shard_of(folder, last), lambda tensors: tensors[last].fill_(torch.nan))
    else:
        read = streaming._read_exactly

        def interrupted(stream: io.FileIO, piece: memoryview, entry: Any) -> None:
            read(stream, piece, entry)
            if entry.key == last:
                raise interruption

        monkeypatch.setattr(streaming, "_read_exactly", interrupted)
    before, storages.peak = storages.live, 0
    with pytest.raises(interruption or CheckpointError) as caught:
        load(folder, config=CONFIG, progress=True)
    assert storages.peak > before + 20_000  # most of the weights were there
    assert caught.value.__traceback__ is not None  # and the error still refers to every frame
    assert storages.live == before


# Writing -------------------------------------------------------------------------------------------------------------


def test_shards_and_index(folder: Path) -> None:
    state, index = weights(), index_of(folder)
    files = sorted(folder.glob("model-*"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert list(index["weight_map"]) == list(state)
    for file in files:
        content = load_file(file)
        assert sum(value.nbytes for value in content.values()) <= 8000 or len(content) == 1
        for key, value in content.items():
            assert index["weight_map"][key] == file.name
            assert torch.equal(value, state[key]) and value.dtype == state[key].dtype
    assert {path.name for path in folder.iterdir()} == {INDEX, *(file.name for file in files)}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrites_only_where_told_to(folder: Path) -> None:
    (folder / "README.md").write_text("kept")
    before = snapshot(folder)
    state = {key: value + 1 for key, value in weights().items()} | {BANDS: weights()[BANDS]}
    with pytest.raises(FileExistsError, match=r"sharded holds a checkpoint .*overwrite=True"):
        save_checkpoint(state, folder)
    assert snapshot(folder) == before
    save_checkpoint(state, folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.safetensors"}
    assert torch.equal(load(folder, config=CONFIG, progress=False).state_dict()[QKV], state[QKV])
    save_checkpoint(weights(), folder, max_shard_bytes=8000, overwrite=True)
    assert snapshot(folder) == before


@pytest.mark.parametrize("where", ["write", "move"])
@pytest.mark.parametrize("existing", ["nothing", "a folder", "a checkpoint"])
def test_interrupted_save_leaves_the_folder_as_it_was(
    where: str, existing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    if existing != "nothing":
        folder.mkdir()
        (folder / "README.md").write_text("kept")
    if existing == "a checkpoint":
        save_checkpoint({"old": torch.ones(3), "older": torch.ones(3)}, folder, max_shard_bytes=1)
    before = snapshot(tmp_path)
    remaining = 1 if existing == "nothing" and where == "move" else 4
    original: Callable[..., object] = save_file if where == "write" else Path.replace

    def interrupt(*args: Any, **kwargs: Any) -> object:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    owner, name = (safetensors.torch, "save_file") if where == "write" else (Path, "replace")
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(weights(), folder, max_shard_bytes=4000, overwrite=True)
    assert snapshot(tmp_path) == before
    assert folder.exists() == (existing != "nothing")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_is_told_by_the_name_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by that of the file written aside, which is gone by then."""

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"/new/model\.safetensors cannot be written: I/O error: No space"):
        save_checkpoint(weights(), tmp_path / "new")
    with pytest.raises(OSError, match=r"/clip\.safetensors cannot be written: I/O error: No space"):
        save_tensors(tmp_path / "clip.safetensors", weights(), {})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    for bad, error, named in (
        ([1], TypeError, "got list"),
        ({"a.key": 1}, TypeError, "'a.key': int"),
        ({}, ValueError, "got none"),
        (HappyHorse(CONFIG, device="meta"), ValueError, "adapter.video_embedder.weight on the meta device"),
    ):
        with pytest.raises(error, match=named):
            save_checkpoint(bad, tmp_path / "new")  # type: ignore[arg-type]
    for size in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_shard_bytes must be"):
            save_checkpoint(weights(), tmp_path / "new", max_shard_bytes=size)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_checkpoint(weights(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
