"""Every committed `fp8_linear` configuration compiled for its architecture, without a GPU, and its resources held."""

import json
import os
import subprocess
import sys

import pytest

from happyhorse_fast.kernels.launch import ARCHITECTURES, FP8_SINCE, LaunchConfig, illegal, table

pytestmark = pytest.mark.slow

STEM = "fp8_linear"
# (F, K) of the 15B model where an op meets them: up, down, projection; group 64 is the down projection's input.
SHAPES = {"plain": (5120, 5120), "residual": (5120, 5120), "swiglu7": (27_392, 5120), "gelu7": (20_480, 5120)}
DOWN = {64: (5120, 13_696), 128: (5120, 20_480)}
# Compiled in a process without TRITON_INTERPRET: jobs as JSON on stdin, one line of resources per job on stdout.
COMPILER = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from happyhorse_fast.kernels.fp8_linear import fp8_linear_kernel as kernel

tools = Path(triton.__file__).parent / "backends/nvidia/bin"
for job in json.load(sys.stdin):
    pointers, values = job["pointers"], job["values"]
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], constants[(i,)] = "constexpr", values[name]
        elif name in job["blocks"]:
            signature[name] = f"tensordesc<{pointers[name]}{job['blocks'][name]}>"
        elif name in pointers:
            signature[name], attributes[(i,)] = "*" + pointers[name], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", job["arch"], 32),
        options=job["options"],
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage, sass = (
            subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    result = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    result |= {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "QGMMA", "HMMA", "STL", "LDL")}
    print(json.dumps(result | {"shared": built.metadata.shared}), flush=True)
"""


def jobs(variant, arch):
    """What is launched under a configuration: both ways to load where descriptors are on, both kinds of output."""
    config = LaunchConfig(**table(STEM)[variant][str(arch)])
    precision, *middle, epilogue = variant.split("_")
    fp8, group = precision == "fp8", int(middle[0].removeprefix("group")) if middle else 0
    features, inputs = DOWN.get(group, SHAPES[epilogue]) if epilogue == "residual" else SHAPES[epilogue]
    codes = "fp8e4nv" if fp8 else "bf16"
    for described in {config.descriptors, False}:
        for quantize in {False, epilogue in ("swiglu7", "gelu7") and arch >= FP8_SINCE}:
            out = "fp32" if epilogue == "residual" else "fp8e4nv" if quantize else "bf16"
            width = min(config.block_n, 128) if group else config.block_n
            blocks = {"x": [config.block_m, config.block_k], "weight": [width, config.block_k]}
            yield {
                "arch": arch,
                "blocks": blocks if described else {},
                "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
                "pointers": {"x": codes, "weight": codes, "out": out, "row_tiles": "i32"}
                | dict.fromkeys(("x_scale", "weight_scale", "out_scale"), "fp32"),
                "values": {
                    "F": features,
                    "K": inputs,
                    "ROW_TILE": 128,
                    "FP8": fp8,
                    "GROUP": group,
                    "EPILOGUE": epilogue,
                    "QUANTIZE": quantize,
                    "DESCRIPTORS": described,
                    "BLOCK_M": config.block_m,
                    "BLOCK_N": config.block_n,
                    "BLOCK_K": config.block_k,
                    "GROUP_M": config.group_m,
                },
            }


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", sorted(table(STEM)))
def test_every_committed_configuration_compiles(variant, arch):
    if str(arch) not in table(STEM)[variant]:
        assert variant.startswith("fp8") and arch < FP8_SINCE
        return
    todo = list(jobs(variant, arch))
    done = subprocess.run(
        [sys.executable, "-c", COMPILER],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fp8 = variant.startswith("fp8")
    for job, line in zip(todo, done.stdout.splitlines(), strict=True):
        found, what = json.loads(line), (job["values"], line)
        config = LaunchConfig(**table(STEM)[variant][str(arch)])
        assert illegal(config, arch, fp8=fp8, shared_bytes=found["shared"]) is None, what
        assert found["REG"] <= 255, what
        assert (found["STACK"], found["STL"], found["LDL"]) == (0, 0, 0), what
        if arch == 90:
            assert found["HMMA"] == 0, what
            assert found["QGMMA" if fp8 else "HGMMA"] > 0, what
