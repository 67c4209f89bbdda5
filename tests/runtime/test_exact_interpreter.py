"""A kernel called on the CPU: exact in Triton's interpreter unasked; without it an error that says what to do."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from happyhorse_fast.ops import rmsnorm_quantize
hidden, weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 100, torch.zeros(1, 128)
tiles = torch.tensor([[0, 0, 64]], dtype=torch.int32)
for out in ("bf16", "int8", "fp8"):
    a, b = (rmsnorm_quantize(hidden.clone(), weight, tiles, out=out, backend=n)[0] for n in ("triton", "reference"))
    print(int((a.float() != b.float()).sum()))
"""
NO_KEY = """
import warnings
import torch
from happyhorse_fast import BlockMap
from happyhorse_fast.ops import block_sparse_attention
warnings.simplefilter("error")
x = torch.zeros(256, 1, 32, dtype=torch.bfloat16)
keys_of_half_a_block = BlockMap.from_ranges([(0, 64)], [(0, 256)], 256, 256)
options = {"block_map": keys_of_half_a_block, "scale": 1.0, "bound": 1.0, "return_lse": True}
_, _, lse = block_sparse_attention(x, x, x, **options, backend="triton")
print(*lse.squeeze()[[0, 100, 200]].tolist())
"""


def test_a_kernel_under_the_interpreter_is_exact_by_itself():
    """As shipped, 3.7.1 truncates to bf16: half of the elements differ."""
    done = run(CODE, interpret="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0"]


def test_the_lse_of_a_row_without_a_key_is_no_warning():
    done = run(NO_KEY, interpret="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["-inf", "-inf"]


TRACE = """
import contextlib
import torch
from happyhorse_fast import BackendError
from torch._dynamo.backends.common import aot_autograd
from happyhorse_fast.ops import quantize_rows
def show(graph, inputs):
    print(*(node.target for node in graph.graph.nodes if "happyhorse_fast" in str(node.target)))
    return graph
traced = torch.compile(
    lambda x: quantize_rows(x, hadamard=True, backend="triton"), backend=aot_autograd(fw_compiler=show)
)
with contextlib.suppress(BackendError):  # after it was traced
    traced(torch.empty(64, 4096, dtype=torch.bfloat16))
"""


@pytest.fixture(scope="module")
def not_interpreted():
    """A trace, and then a call, in one process: most of its time goes into imports."""
    return run(TRACE + CODE, interpret="0")


def test_without_the_interpreter_the_error_says_what_to_do(not_interpreted):
    """Triton's own is "0 active drivers ([]). There should only be one."."""
    said = not_interpreted.stderr
    assert "BackendError: happyhorse_fast::rmsnorm_quantize cannot run: Triton kernels need a GPU" in said
    assert "or pass backend='reference'" in said


def test_a_trace_keeps_the_op_whole(not_interpreted):
    """Looked into it would launch without TMA descriptors, and on Hopper another kernel."""
    assert not_interpreted.stdout.split() == ["happyhorse_fast.quantize_rows.default"], not_interpreted.stderr


def run(code: str, interpret: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
