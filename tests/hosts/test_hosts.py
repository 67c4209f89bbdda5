"""The package of hosts: what it offers, loads, and says of versions."""

import inspect
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny_transformers import TINY

import happyhorse_fast as hh
from happyhorse_fast import hosts
from happyhorse_fast.hosts import versions

ROOT = Path(__file__).parents[2]
HOSTS = ["comfy", "diffusers", "kernels", "vllm", "vllm_omni"]


def test_every_name_is_what_it_says():
    assert dir(hosts) == sorted(hosts.__all__)
    for name in hosts.__all__:
        there = getattr(hosts, name)
        assert (there.__name__.rpartition(".")[2]) == name
    with pytest.raises(AttributeError, match="has no attribute 'difusers'"):
        _ = hosts.difusers
    assert hh.hosts is hosts


def test_no_module_of_it_imports_a_host():
    folder = Path(hosts.__file__).parents[2]
    modules = [
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in (folder / "happyhorse_fast/hosts").rglob("*.py")
    ]
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print(json.dumps([name for name in {HOSTS} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 5 and json.loads(done.stdout) == []


def rows(columns):
    """Cells of the page's tables of so many columns, without their heads."""
    lines = re.findall(r"^\| (.+) \|$", (ROOT / "docs" / "HOSTS.md").read_text(), re.M)
    return [cells for cells in (line.split(" | ") for line in lines) if len(cells) == columns][1:]


def test_the_page_has_the_tested_versions():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert {cells[0]: cells[1] for cells in rows(5)} == {"PyTorch": pinned["torch"], **versions.TESTED}
    assert versions.TESTED["diffusers"] == pinned["diffusers"], "the last of its lines: for Python 3.11 and later"
    assert sys.version_info < (3, 11) or version("diffusers") == pinned["diffusers"]


def test_the_shares_of_attention_follow_from_their_rows():
    table = rows(6)
    assert len(table) == 8
    for model, _, tokens, width, weights, share in table:
        attention = 4 * int(tokens.replace(",", "")) * int(width)
        assert share == f"{attention / (attention + 2e6 * float(weights)):.0%}", model


def test_the_sizes_of_a_row_are_those_of_the_classes():
    """W of the models whose defaults are the published sizes: the weights of a block's linear layers, per token."""
    import diffusers

    weights = {model: float(cells[2]) for model, *cells in ((r[0], *r[2:]) for r in rows(6))}
    wan = inspect.signature(diffusers.WanTransformer3DModel.__init__).parameters
    d, ffn = wan["num_attention_heads"].default * wan["attention_head_dim"].default, wan["ffn_dim"].default
    assert round((6 * d * d + 2 * d * ffn) / 1e6, 1) == weights["Wan 2.1, 2.2 14B"]
    for name, kind in (("HunyuanVideo", "HunyuanVideoTransformer3DModel"), ("Flux.1", "FluxTransformer2DModel")):
        sizes = inspect.signature(getattr(diffusers, kind).__init__).parameters
        d = sizes["num_attention_heads"].default * sizes["attention_head_dim"].default
        assert round(12 * d * d / 1e6, 1) == weights[name]
    own = hh.ModelConfig.preset("happyhorse-1.0-15b-dense")
    c, d, heads = own.hidden_size, own.head_dim, (own.num_heads_q, own.num_heads_kv)
    rows_qkv = (heads[0] + 2 * heads[1]) * d + heads[0]
    for mlp in (27304 + 13652, 2 * 20480):  # SwiGLU7 and GELU7, docs/DESIGN.md
        assert round(c * (rows_qkv + heads[0] * d + mlp) / 1e6, 1) == weights["HappyHorse 15B, dense"]


def test_the_python_examples_of_the_page_run_on_a_cpu_but_the_last(capsys):
    """With a tiny Wan as the pipeline; the last needs `kernels`: test_host_hub.py."""
    *examples, last = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "HOSTS.md").read_text(), re.S | re.M)
    assert len(examples) == 3 and "import LocalLayerRepository" in last
    q, k, v = torch.randn(3, 1, 2, 40, 32).bfloat16()
    names = {"q": q, "k": k, "v": v, "pipe": Pipe(TINY["Wan"].model())}
    for example in examples:
        exec(example, names)
    hh.hosts.diffusers.disable(names["pipe"].transformer)
    said = capsys.readouterr().out
    assert "PyTorch: 0 attention calls by happyhorse_fast; 1 by PyTorch itself" in said
    assert "diffusers: 0 attention calls by happyhorse_fast; 4 by diffusers itself" in said
    assert names["window"].queries == names["chosen"].tokens == 75_600


class Pipe:
    """A pipeline of one step."""

    def __init__(self, transformer):
        self.transformer = transformer

    def __call__(self, *_):
        with torch.no_grad():
            self.transformer(**TINY["Wan"].inputs())
