"""The shim's asynchronous copies: data is there after the wait, for other threads after a barrier, and never before."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_shim import Shim, ShimError

# Thread i copies the i-th 16 bytes and reads those of its neighbour.
KERNEL = """
#include "async_copy.cuh"
#include "numerics.cuh"

struct NeighbourParams {
  const float4* from;
  float4* to;
  int bytes, shift;
};

HH_KERNEL(neighbour, NeighbourParams, 64) {
  HH_SHARED_MEMORY(shared);
  float4* const tile = reinterpret_cast<float4*>(shared);
  const int i = static_cast<int>(threadIdx.x);
  copy_async_16(reinterpret_cast<u8*>(tile + i) + p.shift, p.from + i, p.bytes);
  WAIT
  MEET
  p.to[i] = tile[(i + 1) % 64];
  LATE
}
"""
THREADS = 64


class NeighbourParams(ctypes.Structure):
    _fields_ = [("from", ctypes.c_void_p), ("to", ctypes.c_void_p), ("bytes", ctypes.c_int), ("shift", ctypes.c_int)]


def run(folder, *, wait="wait_for_copies();", meet="__syncthreads();", late="", bytes=16, shift=0, order=0, null=False):
    path = folder / "neighbour.cu"
    path.write_text(KERNEL.replace("WAIT", wait).replace("MEET", meet).replace("LATE", late))
    shim = Shim([path])
    source, result = torch.arange(4.0 * THREADS).view(THREADS, 4), torch.empty(THREADS, 4)
    params = NeighbourParams(0 if null else source.data_ptr(), result.data_ptr(), bytes, shift)
    with shim.order(order):
        shim("neighbour", "neighbour", params, (1, 1, 1), THREADS, THREADS * 16)
    return source.roll(-1, 0), result


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_copy_that_is_waited_and_met_for_is_there(order, tmp_path):
    expected, result = run(tmp_path, order=order)
    assert torch.equal(result, expected)


def test_without_a_wait_there_is_poison(tmp_path):
    _, result = run(tmp_path, wait="", late="__syncthreads(); wait_for_copies();")
    assert result.isnan().all()


@pytest.mark.parametrize("order", [0, 1])
def test_without_a_barrier_the_neighbours_copy_is_not_there(order, tmp_path):
    # Ascending, thread i + 1 has not begun; descending, it has finished, but thread 0 has not when thread 63 looks.
    expected, result = run(tmp_path, meet="", order=order)
    wrong = result.isnan().any(dim=1)
    assert wrong.tolist() == ([True] * 63 + [False] if order == 0 else [False] * 63 + [True])
    assert torch.equal(result[~wrong], expected[~wrong])


def test_only_the_asked_bytes_are_read_and_the_rest_is_zero(tmp_path):
    expected, result = run(tmp_path, bytes=8)
    assert torch.equal(result[:, :2], expected[:, :2]) and (result[:, 2:] == 0).all()
    assert (run(tmp_path, bytes=0, null=True)[1] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wait": ""}, "returns while copies to shared memory are under way"),
        ({"shift": 4}, "copy_async_16 at neighbour.cu:.*: both addresses must be aligned to 16 bytes"),
        ({"shift": 16}, "thread 63: copy_async_16 .*: outside shared memory"),
        ({"bytes": 17}, "0 to 16 bytes may be read"),
    ],
)
def test_what_hardware_would_punish_is_reported(change, message, tmp_path):
    with pytest.raises(ShimError, match=message):
        run(tmp_path, **change)
