"""Everything that decides the bytes of a compressed checkpoint, and the fingerprint that a resumed run must match."""

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.compression.formats.base import Format
from accel.compression.levels.database import LevelDatabase
from accel.compression.levels.level import level_name, names
from accel.compression.output import OutputFolder
from accel.compression.plan import Group, make_plan
from accel.compression.quantizers.base import Quantizer, Scheme
from accel.data.tokens import fingerprint as tokens_fingerprint
from accel.errors import UserError
from accel.models.architecture import Architecture
from accel.models.checkpoint import Checkpoint

PROPAGATE = ("quantized", "original")


@dataclass(frozen=True)
class Settings:
    """A compression as plain values, which travel to every worker.

    levels: where there are some, output becomes a database of all layers at all of them, and scheme is the one whose
    outputs are propagated. ignore, skip_first, skip_last: see plan.make_plan. propagate: whose outputs the next block
    is calibrated on. dtype: of the arithmetic. batch: calibration sequences that run through a block at once. shards:
    chunks that the calibration sequences are cut into, each owned by one worker. expert_tokens: experts that saw fewer
    are rounded to nearest.
    """

    checkpoint: Path
    output: Path
    quantizer: Quantizer
    scheme: Scheme
    format: Format
    levels: tuple[Scheme, ...] = ()
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
        if self.levels and self.propagate == "quantized" and self.scheme not in self.levels:
            raise UserError(
                f"reference={level_name(self.scheme)} is none of the levels {', '.join(names(self.levels))}"
            )
        for name in ("threads", "batch", "shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range: 1 or more")

    def fingerprint(self, checkpoint: Checkpoint, tokens: Tensor | None) -> dict[str, Any]:
        """What must be equal for a run to go on where another stopped, as plain values."""
        return {
            "checkpoint": checkpoint.fingerprint(),
            "calibration tokens": None if tokens is None else tokens_fingerprint(tokens),
            "quantizer": repr(self.quantizer),
            **asdict(self.scheme),
            "levels": names(self.levels),
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
            "code": _code_version(),
        }


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
        if settings.levels:
            for groups in self.plan:
                for group in groups:
                    for scheme in settings.levels:
                        scheme.check(group.key, group.columns)
            self.output = LevelDatabase(
                settings.output, self.checkpoint, self.plan, settings.levels, settings.scheme, settings.format
            )
        else:
            self.output = OutputFolder(settings.output, self.architecture, self.plan, settings.format)


@cache
def _code_version() -> str:
    """Hash of the sources that the bytes depend on: any change of an algorithm is a change of version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("accel/compression", "accel/models", "kernels"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
