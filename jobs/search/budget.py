"""The unit of a search's budget, and the cost of a level in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.accel.compression.allocators.base import ATTENTION, MLP, Unit
from hasten.accel.compression.allocators.budgets import (
    BITS,
    PICOSECONDS,
    BudgetUnit,
    Gigabytes,
    Milliseconds,
)
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.units import Price, make_units
from hasten.accel.costs.hardware import PLAIN, Hardware, arithmetic, experts_read
from hasten.accel.costs.model import Model
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import EMBEDDING, Architecture, Layer
from hasten.jobs.cli.methods import build
from hasten.jobs.search.options import SearchConfig

_BITS, _GIGABYTES = "bits", "gigabytes"
_PICOSECONDS_IN_A_SECOND = 1000 * PICOSECONDS


@dataclass(frozen=True)
class SearchBudget:
    """What the budget of a search counts. price: cost of a level; None: its bits."""

    unit: BudgetUnit
    price: Price | None = None

    @classmethod
    def of(cls, config: SearchConfig, architecture: Architecture, database: LevelDatabase) -> "SearchBudget":
        """The budget of a config; UserError where its unit does not fit the other options."""
        if config.budget_unit == _BITS:
            return cls(BITS)
        layers = [layer for groups in database.layer_groups for group in groups for layer in group.layers]
        if config.budget_unit == _GIGABYTES:
            return cls(Gigabytes(_fixed_bytes(architecture, layers)))
        parts = {ATTENTION, MLP} & set(config.drop)
        if parts:
            raise UserError(
                f"drop=[{','.join(sorted(parts))}] saves no time, because loaders multiply by the zeros of a dropped "
                f"part: use drop=[block] with budget_unit={config.budget_unit}"
            )
        times = _Times(build(config.hardware), architecture, config.latency.tokens)
        return cls(Milliseconds(int(config.latency.other * PICOSECONDS) + times.fixed(layers)), times.price)

    def units(self, config: SearchConfig, database: LevelDatabase, solved: bool = True) -> list[Unit]:
        """Units of the search, with their costs; solved: see make_units."""
        return make_units(database, config.grouping, config.keep, config.drop, solved, self.price)


class _Times:
    """Predicted picoseconds of products in a pass of `tokens` tokens."""

    def __init__(self, hardware: Hardware, architecture: Architecture, tokens: int) -> None:
        self._hardware, self._architecture, self._tokens = hardware, architecture, tokens
        model = Model(architecture, architecture.dtype)
        self._shares = {
            layer.name: model.active_share(block)
            for block in range(architecture.num_blocks)
            for layer in architecture.linears(block)
            if layer.expert is not None
        }

    def price(self, layer: Layer, level: Level | None, bits: int) -> int:
        """Picoseconds of a layer's product at a level; None is the uncompressed layer."""
        kind = PLAIN if level is None else arithmetic(level.inputs)
        rows, read = float(self._tokens), 1.0
        if layer.expert is not None:
            share = self._shares[layer.name]
            rows, read = self._tokens * share, experts_read(share, self._tokens)
        seconds = self._hardware.seconds(layer.rows * layer.columns, bits, kind, rows, read)
        return round(seconds * _PICOSECONDS_IN_A_SECOND)

    def fixed(self, layers: Sequence[Layer]) -> int:
        """Picoseconds of the linear layers, and of the output layer, that are not among `layers`."""
        architecture, known = self._architecture, {layer.name for layer in layers}
        others = [layer for block in range(architecture.num_blocks) for layer in architecture.linears(block)]
        # Of output layer and embedding, only the output layer is a product.
        others += [layer for role, layer in architecture.outer_layers().items() if role != EMBEDDING]
        checkpoint = architecture.checkpoint
        return sum(
            self.price(layer, None, 8 * checkpoint.nbytes(f"{layer.name}.weight"))
            for layer in others
            if layer.name not in known
        )


def _fixed_bytes(architecture: Architecture, layers: Sequence[Layer]) -> int:
    """Bytes of the checkpoint's tensors that are no weight of these layers."""
    checkpoint, known = architecture.checkpoint, {f"{layer.name}.weight" for layer in layers}
    names = [name for block in range(architecture.num_blocks) for name in architecture.block_tensors(block)]
    return sum(checkpoint.nbytes(name) for name in [*names, *architecture.outer_tensors()] if name not in known)
