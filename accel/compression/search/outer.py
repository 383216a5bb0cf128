"""The output layer and the embedding of a search's candidates, whose levels change like those of the blocks' layers."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.blocks import WeightCache
from hasten.accel.models.architecture import EMBEDDING, HEAD, TIED, Architecture
from hasten.accel.models.output_layer import OutputLayer


class OuterWeights:
    """Embedding and output layer at any level.

    weights(layer, level) returns a matrix, in any dtype, in which it is held. The matrix in use stays in memory, and
    earlier ones in the cache.
    """

    def __init__(
        self,
        architecture: Architecture,
        units: Sequence[Unit],
        weights: Callable[[str, str], Tensor],
        cache: WeightCache | None = None,
    ) -> None:
        self._architecture, self._read, self._cache = architecture, weights, cache or WeightCache(0)
        layers = architecture.outer_layers()
        self._names = {role: layers[role if role in layers else TIED].name for role in (HEAD, EMBEDDING)}
        of_layers = {layer: unit.name for unit in units for layer in unit.layers}
        # Names of the units by role; output layer and embedding have the same unit where they are one tensor.
        self.units = {role: of_layers[name] for role, name in self._names.items() if name in of_layers}
        # The matrix in use of each layer, with its level.
        self._used: dict[str, tuple[str, Tensor]] = {}

    def level(self, role: str, levels: Mapping[str, str]) -> str:
        """Level of the matrix with this role. levels: of the units, by name."""
        return levels[self.units[role]] if role in self.units else KEEP

    def embed(self, tokens: Tensor, level: str) -> Tensor:
        """Hidden states [B, T, D] that enter the first block, for tokens [B, T]."""
        return self._architecture.embed(tokens, None if level == KEEP else self._matrix(EMBEDDING, level))

    def output_layer(self, level: str) -> OutputLayer:
        """The output layer with its matrix at a level."""
        if level == KEEP:
            return self._architecture.output_layer()
        return self._architecture.output_layer_of(self._matrix(HEAD, level))

    def _matrix(self, role: str, level: str) -> Tensor:
        name = self._names[role]
        if name not in self._used or self._used[name][0] != level:
            matrix = self._cache.take((name, level))
            if matrix is None:
                matrix = self._read(name, level).to(self._architecture.device)
            if name in self._used:
                old, unused = self._used.pop(name)
                self._cache.put((name, old), unused)
            self._used[name] = level, matrix
        return self._used[name][1]
