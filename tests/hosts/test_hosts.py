"""The package of hosts: what it offers, loads, and says of versions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import happyhorse_fast as hh
from happyhorse_fast import hosts

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
    modules = [f"happyhorse_fast.hosts.{path.stem}" for path in Path(hosts.__file__).parent.glob("*.py")]
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print(json.dumps([name for name in {HOSTS} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 5 and json.loads(done.stdout) == []
