"""The repository that `python -m happyhorse_fast.hosts.hub` builds, loaded as `kernels` loads one."""

import ast
import base64
import contextlib
import hashlib
import io
import json
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from host_wheels import ROOT, run

from happyhorse_fast.hosts.hub import __main__ as command
from happyhorse_fast.hosts.hub import build as hub
from happyhorse_fast.hosts.hub import layers

ABSENT = """
import importlib.util, json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "happyhorse_fast":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
# What `kernels` does with a variant's folder; this package must not be needed, nor be there.
LOAD = """
variant = Path(sys.argv[1])
metadata = json.loads((variant / "metadata.json").read_text())
spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[metadata["id"]] = kernel
spec.loader.exec_module(kernel)

import torch
q, (k, v) = torch.randn(1, 4, 140, 64).bfloat16(), torch.randn(2, 1, 2, 160, 64).bfloat16()
exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
results = [kernel.attention(q, k, v, backend=backend) for backend in ("reference", "triton")]
results.append(kernel.layers.ScaledDotProductAttention()(q, k, v, enable_gqa=True))
window = kernel.BlockMap.from_ranges([(0, 140)], [(0, 100)], queries=140, keys=160)
near = kernel.attention(q, k, v, block_map=window, backend="triton")
wanted = torch.nn.functional.scaled_dot_product_attention(
    q.double(), k[:, :, :100].double(), v[:, :, :100].double(), enable_gqa=True
)
print(json.dumps({
    "names": kernel.__all__,
    "errors": [float((out - exact).norm() / exact.norm()) for out in results]
    + [float((near - wanted).norm() / wanted.norm())],
    "ops": [name for name in dir(torch.ops) if "happyhorse" in name],
}))
"""

# The same by the host's own wheel, and the page's example, whose layer is on a CPU here.
KERNELS = """
import torch
from kernels import get_local_kernel, use_kernel_forward_from_hub

kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
q, k, v = torch.randn(3, 1, 4, 140, 64).bfloat16()
exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
out = kernel.attention(q, k, v)

@use_kernel_forward_from_hub("ScaledDotProductAttention")
class Own(torch.nn.Module):
    def forward(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        raise AssertionError("the layer's own forward")

model = torch.nn.ModuleList([Own()])
exec(Path("example.py").read_text())
print(json.dumps({
    "error": float((out - exact).norm() / exact.norm()),
    "layer": torch.equal(model[0](q, k, v), out),
    "compiled": torch.equal(torch.compile(model[0], backend="eager", fullgraph=True)(q, k, v), out),
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("hub") / "repository", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["hub", str(folder), "--repo-id", "somebody/attention"])
        runpy.run_path(command.__file__, run_name="__main__")
    assert f"files in {folder}" in said.getvalue()
    return folder


def test_it_loads_and_runs_without_this_package(built):
    command = [sys.executable, "-c", ABSENT + LOAD, str(built / "build" / "torch-cpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "attention" in found["names"] and "layers" in found["names"]
    assert len(found["errors"]) == 4 and max(found["errors"]) < 4e-3
    (namespace,) = found["ops"]
    assert namespace.startswith(f"{hub.MODULE}_") and len(namespace) > len(hub.MODULE) + 8, "no digest in it"


@pytest.mark.slow
def test_kernels_itself_loads_it_and_the_example_of_the_page_runs(built, tmp_path):
    *_, example = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "HOSTS.md").read_text(), re.S | re.M)
    assert "LocalLayerRepository" in example
    (tmp_path / "example.py").write_text(example.replace('"FOLDER"', repr(str(built))).replace('"cuda"', '"cpu"'))
    found = run("kernels", "-c", ABSENT + KERNELS, built, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert 0 < found["error"] < 4e-3 and found["layer"] and found["compiled"]


def test_every_module_imports_torch_the_standard_library_and_itself(built):
    allowed = {
        *sys.stdlib_module_names,
        "cuda",
        "numpy",
        "torch",
        "triton",
        "matplotlib",
    }  # that in BlockMap.plot alone
    modules = sorted((built / "torch-ext").rglob("*.py"))
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [str(node.module)]
                up = len(path.relative_to(built / "torch-ext" / hub.MODULE).parent.parts) + 1
                assert node.level <= up, f"{path} imports from above the repository's module"
            assert {name.partition(".")[0] for name in names} <= allowed, path
    assert len(modules) > 50


def test_a_variant_is_what_the_sources_are_and_its_digests_say_so(built):
    source = built / "torch-ext" / hub.MODULE
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for backend in hub.BACKENDS:
        variant = built / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["name"] == hub.NAME
        assert metadata["id"].isidentifier()
        listed = metadata["digest"]["files"]
        assert files == set(map(hub.Path, listed))
        for path, digest in listed.items():
            content = (variant / path).read_bytes()
            assert base64.b64encode(hashlib.sha256(content).digest()).decode() == digest
            assert (source / path).read_bytes() == content
    assert 'repo-id = "somebody/attention"' in (built / "build.toml").read_text()
    assert {path.suffix for path in files} == {".py", ".json", ".cu", ".cuh"}, "build.toml lists what is there"


def test_a_layer_is_pure_and_its_forward_is_pytorchs():
    layer = layers.ScaledDotProductAttention
    assert set(vars(layer)) - {"__module__", "__doc__", "__annotations__", "__annotate_func__"} <= {
        "__annotations_cache__",
        "__firstlineno__",
        "__static_attributes__",
        "can_torch_compile",
        "forward",
        "has_backward",
    }
    q = torch.randn(1, 2, 20, 32).bfloat16()
    wanted = F.scaled_dot_product_attention(q, q, q, None, 0.0, False, scale=0.5, enable_gqa=False)
    torch.testing.assert_close(layer()(q, q, q, None, 0.0, False, 0.5, False), wanted, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="is_causal must be False"):
        layer()(q, q, q, is_causal=True)


def test_a_folder_in_use_and_a_name_without_owner_are_refused(built, tmp_path, monkeypatch, capsys):
    with pytest.raises(FileExistsError, match="must be new or empty"):
        hub.build(built, "somebody/attention")
    with pytest.raises(ValueError, match="repo_id must be owner/name, got 'attention'"):
        hub.build(tmp_path, "attention")
    monkeypatch.setattr(sys, "argv", ["hub", str(tmp_path / "new"), "--repo-id", "attention"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert capsys.readouterr().err.endswith("error: repo_id must be owner/name, got 'attention'\n")
