"""Every peer there is: each used where it is installed, and named as absent, with the reason, where not."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from bench.cases import BLOCK_SPARSE, DROP_IN
from bench.measure.roofline import bf16_product, fp8_product, int8_product
from bench.peers import external
from bench.peers import torch as own
from bench.peers.peer import Peer

LINEAR = ("fp8_linear_activation", "fp8_linear_residual", "qkv_linear")
WITHOUT_GATE, DENSE = (BLOCK_SPARSE, DROP_IN), ("dense",)
LAYER = (*LINEAR, BLOCK_SPARSE, "rmsnorm_quantize")
COMPILES = "compiling takes 10 to 30 s a case on a CPU; timed on GPUs only"
"""40 cases would take longer than everything else together."""
PEERS = (
    Peer("eager", (*LAYER, "select_blocks"), own.eager, on_gpus=""),
    *(
        Peer(
            f"sdpa {name} (no gate)",
            WITHOUT_GATE,
            functools.partial(own.sdpa, f"{name.upper()}_ATTENTION"),
            DENSE,
            on_gpus="" if name == "flash" else "needs a GPU",
        )
        for name in ("cudnn", "flash", "efficient")
    ),
    *(
        Peer(
            f"{name} (product only)",
            LINEAR,
            functools.partial(own.product, maker),
            precisions=precisions,
            one_expert=True,
            since=since,
        )
        for name, maker, precisions, since in (
            ("torch._scaled_mm", fp8_product, ("fp8", "int8"), (8, 9)),
            ("torch._int_mm", int8_product, ("int8",), ()),
            ("torch.mm bf16", bf16_product, (), ()),
        )
    ),
    Peer(
        "FlashAttention-4 bf16 (no gate)",
        WITHOUT_GATE,
        external.flash_attention_4,
        DENSE,
        package="flash-attn-4",
        slow=True,
    ),
    Peer(
        "cuDNN fp8 (no gate)",
        WITHOUT_GATE,
        external.cudnn_fp8,
        DENSE,
        precisions=("fp8",),
        package="nvidia-cudnn-frontend",
    ),
    Peer("sageattention (no gate)", WITHOUT_GATE, external.sageattention, DENSE, package="sageattention"),
    Peer("flex_attention (no gate)", (BLOCK_SPARSE,), own.flex, on_gpus=COMPILES, slow=True),
    Peer("torch.compile", LAYER, own.compiled, on_gpus=COMPILES, slow=True),
)
"""In the order they are timed in, installed or not."""


def split(peers: Iterable[Peer], device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """(those that can run here, reasons of those that cannot by name)."""
    reasons = {peer: peer.available(device) for peer in peers}
    return [p for p, reason in reasons.items() if reason is None], {p.name: r for p, r in reasons.items() if r}
