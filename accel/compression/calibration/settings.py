"""Settings that determine the bytes of a compressed checkpoint, and the fingerprint that a resumed run must match."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.activations.observers.base import InputObserver
from hasten.accel.activations.observers.maximum import Maximum
from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration import outer_solve, shard, solve
from hasten.accel.compression.calibration.chunk_sums import Wanted
from hasten.accel.compression.calibration.layer_groups import Group, common_levels, make_layer_groups, schemes
from hasten.accel.compression.calibration.outer import OuterLevels, is_outer, outer_groups
from hasten.accel.compression.calibration.stages import ATTENTION, Stage, groups_before_attention, stages_of
from hasten.accel.compression.formats.base import Format
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase, attention_names
from hasten.accel.compression.method import Method
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.outputs.gguf import GgufFolder, GgufOptions, options_of
from hasten.accel.compression.outputs.source import check_source
from hasten.accel.compression.pruners.base import Pruner
from hasten.accel.compression.quantizers.base import Quantizer
from hasten.accel.compression.quantizers.columns import ColumnQuantizer
from hasten.accel.compression.transforms.base import BlockTransform, block_solver
from hasten.accel.compression.transforms.checkpoint import TransformedCheckpoint
from hasten.accel.compression.transforms.edits import OUTSIDE, EditFolder
from hasten.accel.compression.transforms.rotating import RotatingTransform, RotationFile, rotating_of
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint
from hasten.accel.compression.transforms.sequence import TransformSequence
from hasten.accel.data.tokens import fingerprint as tokens_fingerprint
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.code_fingerprint import code_fingerprint

PROPAGATE = ("sequential", "quantized", "original")


@dataclass(frozen=True)
class Settings:
    """Settings of a compression as plain values, which are sent to every worker.

    level: level of every layer. levels: None for a checkpoint; otherwise the output is a database of all layers at all
    these levels, and `level` is the one whose outputs are propagated. quantizer, column_quantizer, pruner: each makes
    the levels of its family. ignore, skip_first, skip_last: see layer_groups.make_layer_groups. propagate:
    what layers are calibrated on: outputs of the `original` blocks, of the `quantized` blocks before theirs, or also of
    the compressed layers before them in their block (`sequential`, see calibration/stages.py). dtype: of the
    arithmetic. batch: calibration sequences that run through a block at once. shards: number of chunks of calibration
    sequences, each owned by one worker. expert_tokens: experts that saw fewer tokens are compressed without statistics.
    all_experts: whether the statistics of every expert are of all tokens, and not only of those routed to it.
    outer: levels of output layer and embedding. gguf: options of the GGUF file that is written in place of a checkpoint
    in `format`; None for the checkpoint. observer: chooses static input scales. attention: how keys, values and queries
    are rounded; None where they are not. transforms: of every block, in their order.
    """

    checkpoint: Path
    output: Path
    quantizer: Quantizer
    level: Level
    format: Format
    levels: tuple[Level, ...] | None = None
    pruner: Pruner | None = None
    column_quantizer: ColumnQuantizer | None = None
    ignore: tuple[str, ...] = ()
    skip_first: int = 0
    skip_last: int = 0
    propagate: str = "sequential"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    batch: int = 4
    shards: int = 8
    expert_tokens: int = 128
    all_experts: bool = False
    outer: OuterLevels = field(default_factory=OuterLevels)
    gguf: GgufOptions | None = None
    observer: InputObserver = field(default_factory=Maximum)
    attention: AttentionScheme | None = None
    transforms: tuple[BlockTransform, ...] = ()

    def __post_init__(self) -> None:
        if self.propagate not in PROPAGATE:
            raise UserError(f"propagate={self.propagate!r} is none of {', '.join(PROPAGATE)}")
        if self.levels and self.propagate != "original" and self.level not in self.levels:
            known = ", ".join(level.name for level in self.levels)
            raise UserError(f"reference={self.level.name} is none of the levels {known}")
        for level in self.made:
            level.check_method(level.method_of(self._given))
        if self.needs_original and self.propagate != "sequential":
            names = ", ".join(
                type(transform).__name__.lower() for transform in self.transforms if transform.needs_original
            )
            raise UserError(
                f"propagate={self.propagate} does not go with transforms=[{names}]: use propagate=sequential"
            )
        self._check_block_solver()
        for name in ("threads", "batch", "shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range: 1 or more")

    def _check_block_solver(self) -> None:
        """UserError where a transform cannot compress the layers of a block together."""
        if self.block_solver is None:
            return
        name = type(self.block_solver).__name__.lower()
        if self.levels is not None:
            raise UserError(f"transforms=[{name}] makes one level, not a database of levels: use hasten compress")
        scheme = self.level.loader_scheme
        if scheme is None:
            raise UserError(
                f"transforms=[{name}] rounds to grids, which level {self.level.name} has not: use w4g128 or fp8"
            )
        if scheme.inputs is not None and (scheme.inputs.static or scheme.inputs.strategy == "tensor_group"):
            raise UserError(
                f"transforms=[{name}] collects no scales of inputs, which level {self.level.name} needs: use a level "
                "whose inputs have dynamic scales"
            )

    @property
    def made(self) -> tuple[Level, ...]:
        """The levels at which layers are compressed."""
        return (self.level,) if self.levels is None else self.levels

    @property
    def needs_hessian(self) -> bool:
        """Whether a method, or the layers' targets, need statistics of the layers' inputs."""
        methods = [*self.methods, self.quantizer] if self.outer else self.methods
        return self.needs_original or any(method.needs_hessian for method in methods)

    @property
    def needs_original(self) -> bool:
        """Whether calibrators also run the original model, for the shift of the layers' inputs."""
        return any(transform.needs_original for transform in self.transforms)

    @property
    def block_solver(self) -> BlockTransform | None:
        """The transform that compresses the layers of a block together, if there is one."""
        return block_solver(self.transforms)

    @property
    def rotating(self) -> RotatingTransform | None:
        """The transform that rotates the model, if there is one."""
        return rotating_of(self.transforms)

    @property
    def needs_tokens(self) -> bool:
        """Whether the pass needs calibration tokens: for a method, or for a transform."""
        return self.needs_inputs or any(
            transform.needs_statistics or transform.needs_tokens for transform in self.transforms
        )

    @property
    def needs_ranges(self) -> bool:
        """Whether a level has a static scale of its inputs."""
        return any(level.inputs is not None and level.inputs.is_calibrated for level in self.made)

    @property
    def needs_inputs(self) -> bool:
        """Whether the calibration tokens run through the blocks."""
        return self.needs_hessian or self.needs_ranges or self.attention is not None

    @property
    def wanted(self) -> Wanted:
        """What the pass collects of the inputs."""
        histogram = self.needs_ranges and self.observer.needs_histogram
        return Wanted(self.needs_hessian, self.needs_ranges, histogram, self.attention is not None)

    @property
    def methods(self) -> list[Method]:
        """Methods in use: the given methods that a level needs, then default methods of kinds of levels."""
        needed = [level.method_of(self._given) for level in self.made]
        ordered = [*(method for method in self._given if method in needed), *needed]
        return list(dict.fromkeys(ordered))

    @property
    def _given(self) -> list[Method]:
        return [method for method in (self.quantizer, self.column_quantizer, self.pruner) if method is not None]

    def stages(self, groups: Sequence[Group], before_attention: int | None = None) -> list[Stage]:
        """Groups of a block that are compressed at the same time, in the order in which they are.

        before_attention: see stages.groups_before_attention; None where keys and values are not rounded. The attention
        is calibrated in its own stage, or, where layers are calibrated on the original ones of their block, together
        with all groups.
        """
        if self.block_solver is not None and not is_outer(groups):
            return [tuple(groups)] if groups else []
        if self.propagate == "sequential" and self.needs_inputs and not is_outer(groups):
            return stages_of(groups, before_attention)
        return [tuple(groups)] if groups or before_attention is not None else []

    @property
    def cut(self) -> int:
        """The first chunk of the second half of the calibration sequences, see statistics.Tree."""
        return self.shards // 2

    def fingerprint(self, checkpoint: Checkpoint, tokens: Tensor | None) -> dict[str, object]:
        """Plain values that must be equal for one run to resume another."""
        return {
            "checkpoint": checkpoint.fingerprint(),
            "calibration tokens": None if tokens is None else tokens_fingerprint(tokens),
            "quantizer": repr(self.quantizer),
            "column_quantizer": repr(self.column_quantizer) if self.column_quantizer in self.methods else None,
            "pruner": repr(self.pruner) if self.pruner in self.methods else None,
            **self.level.options(),
            "levels": None if self.levels is None else [level.name for level in self.levels],
            "reference": self.level.name,
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
            "all_experts": self.all_experts,
            "outer": self.outer.names() if self.outer else None,
            "input_observer": repr(self.observer) if self.needs_ranges else None,
            "attention": None if self.attention is None else repr(self.attention),
            "transforms": [repr(transform) for transform in self.transforms],
            "torch": torch.__version__,
            "code": self.code(),
        } | ({} if self.gguf is None else {"gguf": options_of(self.gguf)})

    def code(self) -> dict[str, str]:
        """Digests of the modules that determine the bytes: those of the calibration pass and of its methods."""
        of_outer = (outer_solve, self.outer.levels, self.quantizer) if self.outer else ()
        observer = self.observer if self.needs_ranges else ()
        of_blocks = (observer, self.transforms)
        return code_fingerprint(
            shard, solve, Task, self.methods, self.format, self.made, self.level, of_outer, *of_blocks
        )


class Task:
    """Checkpoint, layer groups and output folder that belong to some settings; every process opens its own.

    original: the checkpoint as it is, or rotated. checkpoint: the same, or what transforms make of it. transforms:
    those that make edits, None where there are none. unrotated, rotation: the model that is rotated, and the file of
    its rotation; None where it is not.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.original: Checkpoint = Checkpoint(settings.checkpoint)
        self.checkpoint = self.original
        check_source(self.original)
        self.transforms: TransformSequence | None = None
        folder = settings.output / (LevelDatabase if settings.levels is not None else OutputFolder).edits
        # A source that is quantized itself is what its weights say: what is written rounds what the levels say.
        open_architecture = partial(Architecture, dtype=settings.dtype, device=settings.device, as_served=False)
        self.unrotated: Architecture | None = None
        self.rotation: RotationFile | None = None
        if settings.rotating is not None:
            self.unrotated = open_architecture(self.original)
            self.rotation = RotationFile(folder)
            finished = partial(self.rotation.finished, settings.rotating.steps)
            rotating = settings.rotating
            self.original = RotatedCheckpoint(self.unrotated, finished, rotating.has_residual, rotating.online)
            self.checkpoint = self.original
        edits = None
        if any(transform.makes_edits for transform in settings.transforms):
            edits = EditFolder(folder, ())
            self.checkpoint = TransformedCheckpoint(self.original, edits)
        self.architecture = open_architecture(self.checkpoint)
        self.architecture.all_experts = settings.all_experts
        if isinstance(self.checkpoint, TransformedCheckpoint):
            self.checkpoint.locate(self.architecture)
        self.layer_groups = all_groups(self.architecture, settings)
        self._attentions = {} if settings.attention is None else attention_names(self.architecture)
        if settings.attention is not None and not self._attentions:
            raise UserError(
                f"kv_cache: no block of {settings.checkpoint} has an attention with a cache: give kv_cache=null"
            )
        if settings.attention is not None and settings.block_solver is not None:
            raise UserError(
                f"kv_cache: {settings.block_solver} compresses whole blocks, without the scales of keys and values: "
                "give kv_cache=null"
            )
        for number, transform in enumerate(settings.transforms):
            transform.check(self.architecture, settings.transforms[:number])
        if edits is not None:
            edits.blocks = self._edited_blocks()
            self.transforms = TransformSequence(
                settings.transforms,
                edits,
                self.original,
                self.layer_groups,
                settings.methods,
                settings.expert_tokens,
                settings.device,
            )
        self.output: OutputFolder | GgufFolder | LevelDatabase
        if settings.levels is not None:
            levels = common_levels(settings.levels, self.layer_groups)
            (propagated,) = common_levels([settings.level], self.layer_groups)
            self.output = LevelDatabase(
                settings.output,
                self.checkpoint,
                self.layer_groups,
                levels,
                propagated,
                settings.attention,
                self._attentions,
                None if edits is None else sorted(edits.blocks),
            )
        elif settings.gguf is not None:
            if settings.attention is not None:
                raise UserError("kv_cache: a GGUF file has no scales of keys and values: give kv_cache=null")
            self.output = GgufFolder(settings.output, self.architecture, self.layer_groups, settings.gguf)
        else:
            self._check_experts()
            self.output = OutputFolder(
                settings.output, self.architecture, self.layer_groups, settings.format, attention=settings.attention
            )

    def attention_name(self, block: int) -> str | None:
        """Name of a block's attention whose keys and values are rounded; None where there is none."""
        return self._attentions.get(block)

    def stages(self, block: int) -> list[Stage]:
        """Stages of a block, see Settings.stages."""
        groups = self.layer_groups[block]
        before = None
        if self.attention_name(block) is not None:
            before = groups_before_attention(self.architecture, block, groups)
        return self.settings.stages(groups, before)

    def calibrates_attention(self, block: int, stage: int) -> bool:
        """Whether the scales of a block's keys and values come from its statistics at a stage."""
        stages = self.stages(block)
        return self.attention_name(block) is not None and (stages[stage] == ATTENTION or ATTENTION not in stages)

    def _edited_blocks(self) -> frozenset[int]:
        """Blocks that transforms edit, OUTSIDE among them."""
        blocks = range(self.architecture.num_blocks)
        if any(transform.is_everywhere for transform in self.settings.transforms):
            return frozenset([OUTSIDE, *blocks])
        return frozenset(block for block in blocks if self.layer_groups[block])

    def _check_experts(self) -> None:
        """UserError where transformers could not load the experts: it reads one grid for the experts of all blocks."""
        experts = {
            layer.name
            for block in range(self.architecture.num_blocks)
            for layer in self.architecture.linears(block)
            if layer.expert is not None
        }
        loaded = schemes(self.layer_groups)
        plain = experts - loaded.keys()
        if loaded and plain:
            raise UserError(
                f"ignore, skip_first or skip_last leave {len(plain)} of {len(experts)} expert layers plain, first "
                f"{min(plain)}: transformers loads experts only if those of all blocks are quantized"
            )


def all_groups(architecture: Architecture, settings: Settings) -> list[list[Group]]:
    """Groups of every block, and behind them those of output layer and embedding where one is compressed."""
    blocks = make_layer_groups(
        architecture,
        settings.level,
        settings.ignore,
        settings.skip_first,
        settings.skip_last,
        settings.levels or (),
    )
    outer = outer_groups(architecture, settings.outer)
    return [*blocks, outer] if outer else blocks
