"""Names and schemas under torch.ops.happyhorse_fast: what exported programs and compiled graphs have in them."""

import importlib

import pytest
import torch

PRODUCT = "Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, "
EPILOGUE = (
    "Tensor qk_norm, Tensor cos_sin, Tensor row_tiles, SymInt num_heads_q, SymInt num_heads_kv, str out, "
    "Tensor? qk_scale=None"
)
GIVEN = "Tensor product, Tensor? row_scale, Tensor? column_scale, "
ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor counts, Tensor starts, Tensor columns, Tensor mask_ids, Tensor mask_bits, "
    "Tensor order, float scale, bool bounded, Tensor? flag, "
)
SCALES = "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
ATTENTION_END = "Tensor? gate, Tensor? out_scale, bool return_lse"
SELECTION = (
    "Tensor q, Tensor k, Tensor table, Tensor prefix, Tensor live, Tensor inverse, Tensor? q_scale, Tensor? k_scale, "
    "SymInt keep, SymInt mass, bool mean"
)
NORM = 'Tensor(a0!) hidden, Tensor norm_weight, Tensor row_tiles, Tensor? branch=None, str out="bf16"'
EVERY, NO_CUDA, NO_TRITON = ("", "_cuda", "_reference"), ("", "_reference"), ("_cuda", "_reference")


def tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


SCHEMAS = {
    "rmsnorm_quantize": (NORM, tensors(2), EVERY),
    "qkv_linear": (PRODUCT + EPILOGUE, tensors(7), EVERY),
    "qk_norm_rope": (GIVEN + EPILOGUE, tensors(7), NO_TRITON),
    "quantize_rows": ("Tensor x, bool hadamard", tensors(2), NO_CUDA),
    "fp8_linear": (PRODUCT + "Tensor row_tiles", "Tensor", NO_CUDA),
    "fp8_linear_residual": (PRODUCT + "Tensor row_tiles, Tensor(a5!) hidden", "()", NO_CUDA),
    "fp8_linear_activation": (PRODUCT + "Tensor row_tiles, str activation, bool fp8", "Tensor", EVERY),
    "activation_quantize": (GIVEN + "Tensor row_tiles, str activation, bool fp8", "Tensor", NO_TRITON),
    "select_blocks": (SELECTION, tensors(5), EVERY),
    "block_sparse_attention": (ATTENTION + SCALES + ATTENTION_END, tensors(2), NO_CUDA),
    "block_sparse_attention_cuda": (ATTENTION + ATTENTION_END, tensors(2), ("",)),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_those_of_exported_programs(name):
    for folder in ("qkv", "row_quantization", "linear", "block_selection", "attention"):
        for backend in ("reference", "triton", *(("cuda",) if folder != "row_quantization" else ())):
            importlib.import_module(f"happyhorse_fast.ops.{folder}.{backend}")
    arguments, returns, suffixes = SCHEMAS[name]
    for suffix in suffixes:
        op = getattr(torch.ops.happyhorse_fast, name + suffix).default
        assert str(op._schema) == f"happyhorse_fast::{name}{suffix}({arguments}) -> {returns}"
    for suffix in {*EVERY} - {*suffixes}:
        assert name + suffix in SCHEMAS or not hasattr(torch.ops.happyhorse_fast, name + suffix)
