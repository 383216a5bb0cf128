"""Everything that decides the bytes of a compressed checkpoint, and the fingerprint that a resumed run must match."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.calibration import shard, solve
from hasten.accel.compression.calibration.layer_groups import Group, make_plan, schemes
from hasten.accel.compression.formats.base import Format
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import Level, level_name, names
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.outputs.code_fingerprint import code_fingerprint
from hasten.accel.compression.pruners.base import Pruner, Sparsity
from hasten.accel.compression.quantizers.base import Quantizer, Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits, ColumnQuantizer
from hasten.accel.data.tokens import fingerprint as tokens_fingerprint
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

PROPAGATE = ("quantized", "original")


@dataclass(frozen=True)
class Settings:
    """A compression as plain values, which travel to every worker.

    levels: where they are not None, output becomes a database of all layers at all of them, the sparse ones by pruner,
    those whose bits differ by column by column_quantizer, and reference is the one whose outputs are propagated, scheme
    where it is None. ignore, skip_first, skip_last: see plan.make_plan. propagate: whose outputs the next block is
    calibrated on. dtype: of the arithmetic. batch: calibration sequences that run through a block at once. shards:
    chunks that the calibration sequences are cut into, each owned by one worker. expert_tokens: experts that saw fewer
    are rounded to nearest, or pruned by magnitude.
    """

    checkpoint: Path
    output: Path
    quantizer: Quantizer
    scheme: Scheme
    format: Format
    levels: tuple[Level, ...] | None = None
    pruner: Pruner | None = None
    column_quantizer: ColumnQuantizer | None = None
    reference: Level | None = None
    ignore: tuple[str, ...] = ()
    skip_first: int = 0
    skip_last: int = 0
    propagate: str = "quantized"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    batch: int = 4
    shards: int = 8
    expert_tokens: int = 128

    def __post_init__(self) -> None:
        if self.propagate not in PROPAGATE:
            raise UserError(f"propagate={self.propagate!r} is none of {', '.join(PROPAGATE)}")
        if self.levels and self.propagate == "quantized" and self.propagated not in self.levels:
            known = ", ".join(names(self.levels))
            raise UserError(f"reference={level_name(self.propagated)} is none of the levels {known}")
        for level in self.levels or ():
            if isinstance(level, ColumnBits) and self.column_quantizer:
                self.column_quantizer.check(level)
        for name in ("threads", "batch", "shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range: 1 or more")

    @property
    def propagated(self) -> Level:
        """The level whose outputs the next block is calibrated on."""
        return self.reference or self.scheme

    @property
    def needs_second_moment(self) -> bool:
        """Whether a method asks for statistics of the layers' inputs."""
        return any(method.needs_second_moment for method in self.methods)

    @property
    def methods(self) -> list[Quantizer | ColumnQuantizer | Pruner]:
        """What layers are compressed by."""
        if self.levels is None:
            return [self.quantizer]
        by_level = {Scheme: self.quantizer, ColumnBits: self.column_quantizer, Sparsity: self.pruner}
        needed = {type(level) for level in self.levels}
        return [method for kind, method in by_level.items() if kind in needed and method]

    def fingerprint(self, checkpoint: Checkpoint, tokens: Tensor | None) -> dict[str, Any]:
        """What must be equal for a run to go on where another stopped, as plain values."""
        return {
            "checkpoint": checkpoint.fingerprint(),
            "calibration tokens": None if tokens is None else tokens_fingerprint(tokens),
            "quantizer": repr(self.quantizer),
            "column_quantizer": repr(self.column_quantizer) if self.column_quantizer in self.methods else None,
            "pruner": repr(self.pruner) if self.pruner in self.methods else None,
            **asdict(self.scheme),
            "levels": None if self.levels is None else names(self.levels),
            "reference": level_name(self.propagated),
            "format": type(self.format).__name__,
            "ignore": list(self.ignore),
            "skip_first": self.skip_first,
            "skip_last": self.skip_last,
            "propagate": self.propagate,
            "dtype": str(self.dtype),
            "device": self.device,
            "threads": self.threads,
            "batch": self.batch,
            "shards": self.shards,
            "expert_tokens": self.expert_tokens,
            "torch": torch.__version__,
            "code": self.code(),
        }

    def code(self) -> dict[str, str]:
        """Digests of the modules that the bytes depend on: of the calibration pass and of the methods that it runs."""
        levels = self.levels or (self.scheme,)
        return code_fingerprint(shard, solve, Task, self.methods, self.format, levels, self.propagated)


class Task:
    """The opened checkpoint of some settings, its plan and its output folder; every process makes its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.checkpoint = Checkpoint(settings.checkpoint)
        if self.checkpoint.is_compressed:
            raise UserError(f"model={settings.checkpoint} is compressed already: give the original checkpoint")
        self.architecture = Architecture(self.checkpoint, settings.dtype, settings.device)
        self.plan: list[list[Group]] = make_plan(
            self.architecture, settings.scheme, settings.ignore, settings.skip_first, settings.skip_last
        )
        self.output: OutputFolder | LevelDatabase
        if settings.levels is not None:
            for groups in self.plan:
                for group in groups:
                    for level in settings.levels:
                        if isinstance(level, Scheme):
                            level.check(group.key, group.columns)
            self.output = LevelDatabase(
                settings.output, self.checkpoint, self.plan, settings.levels, settings.propagated, settings.format
            )
        else:
            self._check_experts()
            self.output = OutputFolder(settings.output, self.architecture, self.plan, settings.format)

    def _check_experts(self) -> None:
        """UserError where transformers could not load the experts: it reads one grid for those of all blocks."""
        experts = {
            layer.name
            for block in range(self.architecture.num_blocks)
            for layer in self.architecture.linears(block)
            if layer.expert is not None
        }
        plain = experts - schemes(self.plan).keys()
        if plain:
            raise UserError(
                f"ignore, skip_first or skip_last leave {len(plain)} of {len(experts)} expert layers plain, first "
                f"{min(plain)}: transformers loads experts only if those of all blocks are quantized"
            )
