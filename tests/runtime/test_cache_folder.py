"""The cache folder without a home, with a ~ in its name, and where nothing can be kept: accelerate goes on."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
import torch
from logged import logs

from happyhorse_fast.ops.runtime import cache_folder, self_check, trust
from happyhorse_fast.ops.runtime.cuda import nvrtc
from happyhorse_fast.ops.runtime.cuda.errors import CudaError

Patch = pytest.MonkeyPatch
CHECK = self_check.KernelCheck("fp8_linear", "bf16", True, "worst tile distance 1.0e-6", 0.1)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: Patch) -> None:
    for name in (cache_folder.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_home(monkeypatch: Patch) -> None:
    """As in a container run as a user that it does not know."""
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_nothing_is_kept_and_that_is_said() -> None:
    with pytest.raises(OSError, match=r"no folder for the cache: .*Set HAPPYHORSE_FAST_CACHE"):
        cache_folder.cache_folder()
    with logs(None):
        assert trust.recall("key") == []
    with logs("self-check cannot be remembered: there is no folder for the cache"):
        trust.remember("key", [CHECK])
    assert len(trust.machine_key("triton", torch.device("cpu"))) == 64


@pytest.mark.usefixtures("no_home")
def test_without_a_home_nvrtc_says_what_to_set(monkeypatch: Patch) -> None:
    monkeypatch.setattr(nvrtc, "version", lambda: 13000)
    monkeypatch.setattr(nvrtc, "_supported", lambda: [90])
    assert "HAPPYHORSE_FAST_CACHE names another folder" in (nvrtc.obstacle((9, 0), 13000) or "")
    monkeypatch.setattr(nvrtc, "compile", lambda stem, wanted: b"code")
    with logs("cannot be kept: there is no folder for the cache"):
        assert nvrtc.compiled("qk_norm_rope", (9, 0), 13000) == b"code"


@pytest.mark.usefixtures("no_home")
def test_a_folder_that_is_named_needs_no_home(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "named"))
    trust.remember("key", [CHECK])
    assert trust.recall("key") == [CHECK] and (tmp_path / "named" / "self_check.key.json").is_file()
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, "~/cache")
    with pytest.raises(OSError, match="no folder for the cache"):
        cache_folder.cache_folder()


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, "~/kept/here")
    assert cache_folder.cache_folder() == tmp_path / "kept" / "here"
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, "~no_such_user/here")
    with pytest.raises(OSError, match="no folder for the cache"):
        cache_folder.cache_folder()


def test_xdg_names_the_folder_unless_it_is_relative(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder.cache_folder() == tmp_path / "xdg" / "happyhorse_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder.cache_folder() == tmp_path / "home" / ".cache" / "happyhorse_fast"


@pytest.mark.parametrize("content", ["3", '"text"', "{", "", '{"key": 3}', '[{"op": 1}]'])
def test_what_is_no_record_is_written_anew(content: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path))
    os.chmod(tmp_path, 0o700)
    (tmp_path / "self_check.key.json").write_text(content)
    with logs("remembered self-check cannot be read"):
        assert trust.recall("key") == []
    trust.remember("key", [CHECK])
    assert trust.recall("key") == [CHECK]
    assert [path.name for path in tmp_path.iterdir()] == ["self_check.key.json"]


@pytest.mark.parametrize("place", ["/proc/happyhorse", "/dev/null", "/dev/null/below"])
def test_a_place_that_takes_nothing_costs_a_check_and_no_error(place: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, place)
    assert trust.recall("key") == []
    with logs("self-check cannot be remembered"):
        trust.remember("key", [CHECK])


def test_bindings_that_are_missing_are_an_error_of_cuda(monkeypatch: Patch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(CudaError, match="cuda-bindings is not installed"):
        nvrtc.version()
