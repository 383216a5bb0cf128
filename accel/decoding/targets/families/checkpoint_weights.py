"""Weights straight from a compressed checkpoint's files: packed layers stay packed, and others keep their stored dtype.

A layer is read, fused and repacked before the next one is read, so that loading takes little more memory than decoding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import RowMap
from hasten.accel.decoding.targets.families.weights import Rows, WeightSource, ordered, side_by_side
from hasten.accel.decoding.targets.matmul import QuantizedWeight, Weight
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.expert_names import canonical, model_types, stored_expert
from hasten.kernels.packed_gemm import dequantized_rows
from hasten.kernels.packed_weight import PackedWeight, can_join, join

_EMBEDDING = "embed_tokens"
_HEAD = "lm_head"
# Of the decoder's tensors in a checkpoint.
_PREFIXES = ("model.", "")


class CheckpointWeights(WeightSource):
    """Weights of a checkpoint. tied: whether its output layer is the embedding. packs: see matmul.Weight."""

    def __init__(
        self, checkpoint: Checkpoint, tied: bool, dtype: torch.dtype, device: torch.device, packs: bool = True
    ) -> None:
        self.dtype, self.device = dtype, device
        self._checkpoint, self._packs = checkpoint, packs
        self._types = model_types(checkpoint.config)
        self._prefix = next(prefix for prefix in _PREFIXES if self._contains(f"{prefix}{_EMBEDDING}.weight"))
        self._tied = tied or not self._contains(f"{_HEAD}.weight")
        embedding = self._name(f"{_EMBEDDING}.weight")
        # The output layer reads a tied embedding in the same form, so that there is one of it.
        self._embedding: QuantizedWeight | Tensor = (
            QuantizedWeight(self._packed(Rows(_EMBEDDING)), packs=packs)
            if checkpoint.is_packed(embedding)
            else self._stored(f"{_EMBEDDING}.weight")
        )

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return self._contains(self._name(name))

    def tensor(self, name: str) -> Tensor:
        """See WeightSource."""
        return self._checkpoint.tensor(self._name(name), self.dtype).to(self.device)

    def embedding(self) -> tuple[RowMap, Callable[[], Tensor]]:
        """See WeightSource."""
        weight, dtype = self._embedding, self.dtype
        if isinstance(weight, Tensor):
            return (lambda ids: weight[ids].to(dtype)), lambda: weight
        packed, rows = weight.weight, torch.arange(weight.weight.shape[0], device=self.device)
        return (lambda ids: dequantized_rows(ids, packed).to(dtype)), lambda: dequantized_rows(rows, packed).to(dtype)

    def product(self, parts: Sequence[Rows]) -> RowMap:
        """See WeightSource: one product of parts that are all plain, or all packed on grids of the same form."""
        if self._tied and [part.module for part in parts] == [_HEAD]:
            weight = self._embedding
            return weight if isinstance(weight, QuantizedWeight) else Weight(weight, None, self._packs, self.dtype)
        if not any(self._is_packed(part) for part in parts):
            weights = [ordered(self._stored(f"{part.module}.weight"), part.order) for part in parts]
            return Weight(
                torch.cat(weights) if len(parts) > 1 else weights[0], self._bias(parts), self._packs, self.dtype
            )
        packed = [self._packed(part) for part in parts if self._is_packed(part)]
        if len(packed) == len(parts) and can_join(packed):
            return QuantizedWeight(join(packed), self._bias(parts), self._packs)
        return side_by_side([self.product([part]) for part in parts])

    def _packed(self, part: Rows) -> PackedWeight:
        weight = self._checkpoint.packed(self._name(f"{part.module}.weight")).to(self.device)
        return weight if part.order is None else weight.rows(part.order.to(self.device))

    def _is_packed(self, part: Rows) -> bool:
        return self._checkpoint.is_packed(self._name(f"{part.module}.weight"))

    def _stored(self, name: str) -> Tensor:
        """A weight in its stored dtype where that is at most as wide as the dtype of products."""
        weight = self._checkpoint.tensor(self._name(name))
        fits = self.device.type == "cpu" and weight.dtype.itemsize < self.dtype.itemsize
        return weight if fits else weight.to(self.device, self.dtype)

    def _bias(self, parts: Sequence[Rows]) -> Tensor | None:
        names = [f"{part.module}.bias" for part in parts]
        if not any(self.has(name) for name in names):
            return None
        return torch.cat(
            [
                ordered(self.tensor(name), part.order)
                if self.has(name)
                else torch.zeros(
                    self._checkpoint.shape(self._name(f"{part.module}.weight"))[0], dtype=self.dtype, device=self.device
                )
                for part, name in zip(parts, names, strict=True)
            ]
        )

    def _contains(self, name: str) -> bool:
        return name in self._checkpoint

    def _name(self, name: str) -> str:
        """Name in the checkpoint."""
        if name.startswith(_HEAD):
            return name
        if name.startswith("layers."):
            layers, number, local = name.split(".", 2)
            name = f"{layers}.{number}.{stored_expert(local, self._types)}"
        return canonical(f"{self._prefix}{name}", self._types)
