"""What depends on a clip's shape only, computed once: layout, rotary phases, row tiles, block maps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from happyhorse_fast.block_map import BlockMap
from happyhorse_fast.model.fast_config import FastConfig
from happyhorse_fast.model.fast_layer import FastLayer, LayerPlan
from happyhorse_fast.model.padded_rows import PaddedRows
from happyhorse_fast.model.sparse_policy import SparsePolicy
from happyhorse_fast.ops import plan_blocks
from happyhorse_fast.ops.packing_qkv import pack_cos_sin
from happyhorse_fast.reference.rotary import rotary_phases
from happyhorse_fast.reference.sequence import Ranges


@dataclass
class Step:
    """Where in a sampler's run the model is: ``index`` of ``count``, both None outside a sampler."""

    index: int | None = None
    count: int | None = None


@dataclass
class ClipState:
    """Everything a forward pass needs beside weights and latents.

    Attributes:
        rows: Where tokens sit.
        device: Where the tensors are.
        fast: The acceleration's configuration.
        num_layers: Layers of the model.
        columns: Token columns of a frame, where the sequence is one clip.
        token_rows: [N] int64 row of every token.
        cos_sin: [rows, D] float32, see docs/OPS.md; padding rows do not rotate.
        dense: Map of the layers without a window.
        local: Map of the layers with one; the same object where the clip is below the window's size.
        step: Where in a sampler's run the model is.
        policies: What makes sparse maps within ``dense`` (True) and ``local`` (False), where there is a policy.
    """

    rows: PaddedRows
    device: torch.device
    fast: FastConfig
    num_layers: int
    columns: int | None
    token_rows: torch.Tensor
    cos_sin: torch.Tensor
    dense: BlockMap
    local: BlockMap
    step: Step
    policies: dict[bool, SparsePolicy] = field(default_factory=dict)
    _tiles: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    _scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        rows: PaddedRows,
        dense: Ranges,
        local: Ranges | None,
        coords: torch.Tensor,
        bands: torch.Tensor,
        fast: FastConfig,
        num_layers: int,
        step: Step,
        columns: int | None = None,
    ) -> ClipState:
        """Compute the state of one clip; waits for the device, so that no forward pass does.

        Args:
            rows: Where tokens sit.
            dense: Attention ranges over tokens of layers without a window.
            local: Of layers with one; None where none applies.
            coords: [N, 9] float32.
            bands: [B].
            fast: The acceleration's configuration.
            num_layers: Layers of the model.
            step: Shared with the model.
            columns: Token columns of a frame, where the sequence is one clip.

        Raises:
            ValueError: ``sparsity`` is ``Tiles`` and the sequence is not one clip.
        """
        device = coords.device
        token_rows = rows.token_rows(device)
        rotation = pack_cos_sin(rotary_phases(coords, bands))
        cos_sin = torch.zeros(rows.slots, rotation.shape[1], dtype=torch.float32, device=device)
        cos_sin[:, : rotation.shape[1] // 2] = 1.0
        cos_sin[token_rows] = rotation
        dense_map = plan_blocks.from_ranges(*rows.to_rows(dense), rows.slots, rows.slots).to(device)
        local_map = dense_map
        if local is not None:
            local_map = plan_blocks.from_ranges(*rows.to_rows(local), rows.slots, rows.slots).to(device)
        policies = {}
        if fast.sparsity is not None:
            # One per exact map: the two differ only where the clip has a window.
            exact = {exact_map is dense_map: exact_map for exact_map in (dense_map, local_map)}
            policies = {which: SparsePolicy(fast.sparsity, exact[which], rows, columns) for which in exact}
        return cls(rows, device, fast, num_layers, columns, token_rows, cos_sin, dense_map, local_map, step, policies)

    def fake(self, device: torch.device | str) -> ClipState:
        """The same shapes on a device that need not exist; to be called under a FakeTensorMode."""

        def like(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        maps = {id(m): m.changed(like) for m in (self.dense, self.local)}
        return dataclasses.replace(
            self,
            device=torch.device(device),
            token_rows=like(self.token_rows),
            cos_sin=like(self.cos_sin),
            dense=maps[id(self.dense)],
            local=maps[id(self.local)],
            policies={which: policy.changed(like) for which, policy in self.policies.items()},
            _tiles={},
            _scales={},
        )

    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes memory on the device."""
        policies = (x for policy in self.policies.values() for x in policy.tensors())
        return [self.token_rows, self.cos_sin, *self.dense.tensors(), *self.local.tensors(), *policies]

    def row_tiles(self, experts: int, first: int = 0, end: int | None = None) -> torch.Tensor:
        """:meth:`PaddedRows.row_tiles` on the device, made once."""
        key = (experts, first, end)
        if key not in self._tiles:
            self._tiles[key] = self.rows.row_tiles(experts, first, end, self.device)
        return self._tiles[key]

    def block_scales(self, layer: FastLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """float32 scales of the layer's q and k codes per block of 128 rows, made once; None in bf16."""
        plan = layer.plan
        if plan.precision["attention"] == "bf16":
            return None, None
        if plan.index not in self._scales:
            scales = layer.qk_scale.index_select(0, self.row_tiles(plan.experts)[:, 0])
            self._scales[plan.index] = scales[:, 0].contiguous(), scales[:, 1].contiguous()
        return self._scales[plan.index]

    def block_map(
        self,
        plan: LayerPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        q_scale: torch.Tensor | None,
        k_scale: torch.Tensor | None,
    ) -> BlockMap:
        """The layer's block map: the exact one, or what the sparsity policy makes of it from q and k."""
        exact = self.local if plan.local else self.dense
        if not self.fast.is_sparse(plan.index, self.num_layers, self.step.index, self.step.count):
            return exact
        policy = self.policies[exact is self.dense]
        return policy.map(q, k, q_scale, k_scale, plan.backend["select_blocks"])
