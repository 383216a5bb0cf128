"""Cost of the calibration pass of compress and levels: hidden states, sums of Hessians, solves, and files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.outer import is_outer, needs_inputs, outer_method
from hasten.accel.compression.calibration.stages import stages_of
from hasten.accel.compression.calibration.statistics import split
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.outputs.checkpoint import outer_shards
from hasten.accel.compression.outputs.gguf import GgufOptions
from hasten.accel.compression.transforms.base import BlockTransform, block_solver
from hasten.accel.compression.transforms.rotating import RotatingTransform, rotating_of
from hasten.accel.costs.estimate import SHARED, Estimate, Process, Rates, Step, Work
from hasten.accel.costs.files import checkpoint_files, checkpoint_tensors, database_files, gguf_files, level_tensors
from hasten.accel.costs.method import hessian_bytes
from hasten.accel.costs.model import Model, with_retained
from hasten.accel.costs.ranks import DEEPSPEED_BYTES, Ranks
from hasten.accel.costs.solving import collect_work, group_bytes, group_work, guess_notes, stack_of

BETWEEN = "sums between nodes"
BETWEEN_RANKS = "weights between ranks"
_TOKEN_BYTES = 8
# Memory for each weight of a group that a transform is solved for: four copies in float32.
_TRANSFORM_BYTES = 16
# Copies of a block's packed layers in the driver: received, and being written.
_COPIES_OF_PACKED = 2


@dataclass(frozen=True)
class Pass:
    """A calibration pass as plain values.

    layer_groups: groups of every block. methods: methods of the compression. levels: levels of a database, None for a
    checkpoint. sequences, length: of the calibration tokens, 0 where no method needs statistics. shards: number of
    chunks of calibration sequences. gpus: of every worker; gpu_memory: bytes of each GPU, 0 without one. nodes: number
    of nodes with workers. propagates: whether the next block is calibrated on the compressed block's outputs. staged:
    whether it is, and layers on outputs of compressed layers of their own block as well. ranks: division of every
    block over a group of calibrators, of which `workers` counts each; None where each has whole blocks. all_experts:
    whether the statistics of every expert are of all tokens. gguf: options of the GGUF file that is written; None for a
    checkpoint. attention: how keys and values are rounded; None where they are not.
    """

    model: Model
    layer_groups: Sequence[Sequence[Group]]
    methods: Sequence[Method]
    sequences: int
    length: int
    levels: Sequence[Level] | None = None
    batch: int = 4
    shards: int = 8
    workers: int = 2
    threads: int = 1
    gpus: int = 0
    gpu_memory: int = 0
    nodes: int = 1
    propagates: bool = True
    staged: bool = True
    ranks: Ranks | None = None
    all_experts: bool = False
    gguf: GgufOptions | None = None
    attention: AttentionScheme | None = None
    collects: bool = True
    transforms: Sequence[BlockTransform] = ()

    @property
    def is_transformed(self) -> bool:
        """Whether transforms need statistics of every block before it is compressed."""
        return bool(self.sequences) and any(transform.needs_statistics for transform in self.transforms)

    @property
    def runs_original(self) -> bool:
        """Whether the original model runs beside the compressed one."""
        return bool(self.sequences) and any(transform.needs_original for transform in self.transforms)

    @property
    def needs_hessian(self) -> bool:
        """Whether a method or a transform needs Hessians, and not only the largest inputs."""
        return self.runs_original or any(method.needs_hessian for method in self.methods)

    @property
    def load_share(self) -> float:
        """Share of a block that a worker reads."""
        return 1.0 if self.ranks is None else 1 / self.ranks.size

    def stages(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """Groups of a block whose sums are collected at the same time."""
        staged = self.staged and self.sequences and self.collects and not is_outer(groups)
        return [*stages_of(groups)] if staged else [groups]

    def sums(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """Groups of a block whose sums exist at the same time."""
        if self.is_transformed and not is_outer(groups):
            return [groups]
        return self.stages(groups) if self.collects else []

    @property
    def sent_sums(self) -> int:
        """Number of sums of a group that all workers send."""
        return sent_sums(self.chunks, self.workers, self.shards // 2)

    @property
    def chunks(self) -> int:
        """Number of chunks: at most one for each sequence."""
        return min(self.shards, self.sequences)

    @property
    def max_chunks(self) -> int:
        """Largest number of chunks of a worker."""
        return max((len(part) for part in split(self.chunks, self.workers)), default=0)

    @property
    def max_sequences(self) -> int:
        """Largest number of sequences of a worker."""
        return self.max_chunks * ceil(self.sequences / self.chunks) if self.chunks else 0


def estimate(work: Pass, rates: Rates) -> Estimate:
    """Processes, steps, traffic and files of the pass, from the start of the calibrators to the last file."""
    written = _written(work)
    packed = max(sum(_packed_bytes(work, group) for group in groups) for groups in work.layer_groups)
    held = [_sums_bytes(work, stage) for groups in work.layer_groups for stage in work.sums(groups)]
    sums = max(held, default=0) * work.sent_sums
    return Estimate(
        processes=(_calibrator(work, rates), _driver(work, rates, packed)),
        steps=tuple(_steps(work, rates, sum(written.values()))),
        moved=_moved(work),
        store=(sums if work.sequences else 0) + (packed if work.levels is None else 0),
        written=written,
        notes=_guesses(work),
    )


def _written(work: Pass) -> dict[str, int]:
    """Bytes of the output's files."""
    architecture, groups = work.model.architecture, work.layer_groups
    if work.levels is not None:
        return database_files(architecture, groups, work.levels, work.attention)
    if work.gguf is not None:
        return gguf_files(architecture, groups, work.gguf)
    return checkpoint_files(architecture, groups, work.attention)


def sent_sums(chunks: int, workers: int, cut: int = 0) -> int:
    """Number of sums of a group that all workers send: each merges its chunks as far as the tree over all allows.

    cut: the first chunk of the second half, which is not merged with the first; 0 where there are no halves.
    """
    total = 0
    for part in split(chunks, workers):
        start = part.start
        while start < part.stop:
            size = 1
            while start % (2 * size) == 0 and start + 2 * size <= part.stop and not start < cut < start + 2 * size:
                size *= 2
            total, start = total + 1, start + size
    return total


def _held_sums(chunks: int) -> int:
    """Number of sums of a group that a worker with `chunks` chunks holds at once, each awaiting its sibling."""
    return chunks.bit_length() if chunks & (chunks - 1) == 0 else chunks.bit_length() + 1


def _sums_bytes(work: Pass, groups: Sequence[Group]) -> int:
    """Bytes of a sum of every group: the Hessian, and the shift where the original model runs, too."""
    total = sum(hessian_bytes(group.columns) for group in groups if needs_inputs([group]))
    if work.runs_original:
        total += sum(4 * group.columns**2 for group in groups if _has_shift(group))
    return total


def _has_shift(group: Group) -> bool:
    """Whether the inputs of the original model are compared: those of experts are of other tokens."""
    return group.role is None and not group.is_expert


def _weights(group: Group) -> int:
    return sum(layer.rows * layer.columns for layer in group.layers)


def _packed_bytes(work: Pass, group: Group) -> int:
    """Stored bytes of a group's layers, at all levels."""
    checkpoint = work.model.architecture.checkpoint
    total = 0
    for layer in group.layers:
        itemsize = checkpoint.dtype(f"{layer.name}.weight").itemsize
        if work.gguf is not None:
            total += sum(size for *_, size in level_tensors(layer, group.level, itemsize))
        elif work.levels is None:
            total += sum(size for *_, size in checkpoint_tensors(layer, group.level, itemsize))
        else:
            levels = _levels(work, group)
            total += sum(size for level in levels for *_, size in level_tensors(layer, level, itemsize))
    return total


def _moved(work: Pass) -> dict[str, int]:
    """Bytes sent between processes: tokens to calibrators, sums to solving processes, packed layers to the driver."""
    moved = {"calibration tokens": work.sequences * work.length * _TOKEN_BYTES}
    if work.sequences:
        count = work.sent_sums
        passes = int(work.collects) + int(work.is_transformed)
        moved["sums of second moments"] = (
            passes * count * sum(_sums_bytes(work, groups) for groups in work.layer_groups)
        )
        if work.nodes > 1:
            fetched = passes * sum(
                _sums_bytes(work, groups) * min(work.nodes, len(groups)) for groups in work.layer_groups
            )
            moved[BETWEEN] = int(count * fetched * (1 - 1 / work.nodes))
        if work.ranks is not None:
            groups = work.workers // work.ranks.size
            for index in range(min(len(work.layer_groups), work.model.blocks)):
                sent = groups * work.ranks.block_moved(work.model, index, 0) * _runs(work, index)
                moved[BETWEEN_RANKS] = moved.get(BETWEEN_RANKS, 0) + sent
    if work.levels is None:
        moved["packed layers"] = sum(_packed_bytes(work, group) for groups in work.layer_groups for group in groups)
    return {name: size for name, size in moved.items() if size}


def _runs(work: Pass, block: int) -> int:
    """How often a block runs on all sequences, without the second run of experts in stages."""
    is_last = block + 1 == len(work.layer_groups)
    again = work.propagates and not (work.staged and work.collects) and not is_last
    return int(work.collects) + int(again) + int(work.is_transformed) + int(work.runs_original)


def _calibrator(work: Pass, rates: Rates) -> Process:
    model = work.model
    held_sums = max((_sums_bytes(work, stage) for block in work.layer_groups for stage in work.sums(block)), default=0)
    on_device = work.gpus > 0
    always = {"process": rates.worker_bytes, "calibration tokens": work.max_sequences * work.length * _TOKEN_BYTES}
    # Forwards of a divided block go through it layer by layer, so that all of them wait in it, too.
    held = model.hidden_bytes(work.max_sequences, work.length)
    held += model.waiting_at_experts(work.max_sequences, work.length, work.batch)
    if work.staged or work.ranks is not None:
        held = max(held, model.waiting_bytes(work.max_sequences, work.length))
    streams = 2 if work.runs_original else 1
    hidden = {"hidden states": streams * held}
    largest = max(model.architecture.linears(model.largest_block()), key=lambda layer: layer.rows * layer.columns)
    stored = model.architecture.checkpoint.dtype(f"{largest.name}.weight").itemsize
    reading = {"tensor as it is read": largest.rows * largest.columns * stored}
    host: dict[str, dict[str, int]] = {"check": {"process": rates.worker_bytes, **_checked(model)}}
    device: dict[str, dict[str, int]] = {}
    if work.sequences:
        block, expert = model.streamed()
        kept, offloaded = {"weights of a block": streams * block}, dict[str, int]()
        if expert:
            kept["layer of an expert"] = expert
            stages = [stage for groups in work.layer_groups for stage in work.stages(groups)] if work.staged else []
            # One that the calibrator has fetched from the object store.
            offloaded["packed layers of a stage"] = max(
                (sum(_packed_bytes(work, group) for group in stage) for stage in stages if stage[0].is_expert),
                default=0,
            )
        if work.ranks is not None:
            kept, offloaded = work.ranks.block_weights(model)
            always |= {"DeepSpeed": DEEPSPEED_BYTES}
        running = {
            **hidden,
            **kept,
            "activations": model.activation_bytes(work.batch, work.length),
        }
        # The float32 copy of a layer's input, where the input has another dtype.
        float32_copy = work.batch * work.length * model.inner * (4 if model.dtype.itemsize < 4 else 0)
        running["activations"] += float32_copy
        sums = {"sums of second moments": held_sums * _held_sums(work.max_chunks)}
        sent = {SHARED: held_sums * sent_sums(work.max_chunks, 1, work.max_chunks // 2)}
        if on_device:
            host["collect"] = {**always, **offloaded, **reading, **sums, **sent}
            device["collect"] = {"context": rates.device_bytes, **running, **sums}
        else:
            host["collect"] = with_retained({**always, **offloaded, **running, **sums, **sent}, running["activations"])
    every = [group for block in work.layer_groups for group in block]
    # Matrices outside the blocks are solved in tiles of rows.
    solved = [
        max((group for group in every if (group.role is None) == inside), key=lambda group: group.cost, default=None)
        for inside in (True, False)
    ]
    for group in [group for group in solved if group is not None]:
        solving = group_bytes(stack_of(group, work.gpu_memory), _solves(work, group))
        phase = "solve" if group.role is None else "solve head"
        at_once = _weights(group) if group.role is None else stack_of(group, work.gpu_memory).slab
        read = max(layer.rows * layer.columns for layer in group.layers)
        reads = {SHARED: _sums_bytes(work, [group]) * work.sent_sums}
        own = {
            "layers as they are read": min(read, at_once) * stored,
            "codes": at_once,
            "packed layers": _COPIES_OF_PACKED * _packed_bytes(work, group),
        }
        reads = reads if work.sequences else {}
        if on_device:
            host[phase] = {**always, **reads, **own}
            device[phase] = {"context": rates.device_bytes, **hidden, **solving, "codes": at_once}
        else:
            states = hidden if work.sequences else {}
            host[phase] = with_retained({**always, **states, **reads, **own, **solving}, sum(solving.values()))
    if work.transforms:
        # A layer's weight, scaled, rounded, and its error.
        weights = max((_weights(group) for group in every if group.role is None), default=0)
        transforming = {"weights of a transform": _TRANSFORM_BYTES * weights}
        if on_device:
            device["transform"] = {"context": rates.device_bytes, **hidden, **transforming}
        else:
            host["transform"] = with_retained({**always, **hidden, **transforming}, _TRANSFORM_BYTES * weights)
    solver = block_solver(work.transforms)
    if solver is not None and work.sequences:
        (device if on_device else host)["tune"] = {
            **({"context": rates.device_bytes} if on_device else always),
            **_tuning(work, solver),
        }
    kind = "calibrator" if work.ranks is None else "rank of a group of calibrators"
    return Process(kind, work.workers, work.threads, host, work.gpus, device)


def _tuning(work: Pass, solver: BlockTransform) -> dict[str, int]:
    """Memory of a block that is solved together: one calibrator has the states of all sequences."""
    model = work.model
    tuned = max((sum(map(_weights, groups)) for groups in work.layer_groups if not is_outer(groups)), default=0)
    return {
        "hidden states": 2 * model.hidden_bytes(work.sequences, work.length),
        "weights of a block": model.block_bytes(model.largest_block()),
        "weights of a transform": solver.block_bytes * tuned,
        "activations": 2 * model.activation_bytes(work.batch, work.length),
    }


def _checked(model: Model) -> dict[str, int]:
    """Memory of the check for values that are not finite: the largest tensor, which is read whole."""
    checkpoint = model.architecture.checkpoint
    return {"largest tensor": max(checkpoint.nbytes(name) for name in checkpoint.names)}


def _driver(work: Pass, rates: Rates, packed: int) -> Process:
    checkpoint = work.model.architecture.checkpoint
    shards = outer_shards(work.model.architecture, work.layer_groups)
    outer = max((checkpoint.nbytes(name) for names in shards for name in names), default=0)
    held = {"process": rates.driver_bytes, "calibration tokens": work.sequences * work.length * _TOKEN_BYTES}
    host = {"finish": {**held, "largest outer tensor": outer}}
    if work.levels is None:
        host["write"] = {**held, "packed layers of a block": _COPIES_OF_PACKED * packed}
    return Process("driver", 1, 0, host)


def _steps(work: Pass, rates: Rates, written: int) -> list[Step]:
    model = work.model
    check = Work(elements=model.elements(), file_bytes=model.stored_bytes()).seconds(rates)
    workers = work.workers
    steps = [Step("check weights", check / workers, check)]
    share = work.max_sequences / work.sequences if work.sequences else 0.0
    tokens = work.sequences * work.length
    wall = {"forward": 0.0, "sums": 0.0, "transform": 0.0, "solve": 0.0, "load": 0.0, "learn rotation": 0.0}
    cpu = dict(wall)

    def add(name: str, arithmetic: Work, worker_share: float, copies: int = 1) -> None:
        seconds = arithmetic.seconds(rates)
        wall[name] += worker_share * seconds
        cpu[name] += copies * seconds

    solver = block_solver(work.transforms)
    # An output layer that is calibrated needs the last block's outputs.
    last_block = sum(not is_outer(groups) or needs_inputs(groups) for groups in work.layer_groups) - 1
    for block, groups in enumerate(work.layer_groups):
        if groups and not is_outer(groups) and work.transforms:
            if work.is_transformed:
                run = model.run(block, tokens, work.length, work.batch)
                if work.all_experts and any(group.is_expert for group in groups):
                    run += _again(model, groups, tokens, 1.0)
                add("forward", run, share)
                add("load", model.load(block) * work.load_share, 1.0, workers)
                add("sums", _collected(work, groups, tokens), share)
            if work.runs_original:
                add("forward", model.run(block, tokens, work.length, work.batch), share)
                add("load", model.load(block) * work.load_share, 1.0, workers)
                shifted = sum(group.columns**2 for group in groups if _has_shift(group))
                add("sums", Work(flops=2.0 * tokens * shifted), share)
            for transform in work.transforms:
                add("transform", transform.cost(groups, work.gpu_memory), 1 / min(workers, max(1, len(groups))))
        if is_outer(groups):
            if work.sequences and needs_inputs(groups):
                add("sums", _collected(work, [group for group in groups if needs_inputs([group])], tokens), share)
        elif work.sequences:
            # With propagation a block runs twice: for the sums, which stops at the last group's input, and, compressed,
            # for the next block's input. Without, and in stages, one run gives both.
            last = groups[-1].layers if groups else ()
            is_last = block == last_block
            experts = any(group.is_expert for group in groups)
            stops = not experts and (is_last if work.staged else work.propagates)
            if groups and work.collects:
                run = model.run(block, tokens, work.length, work.batch)
                if stops:
                    skipped = sum(layer.rows * layer.columns for layer in last)
                    run += Work(flops=-2.0 * tokens * skipped)
                if experts and work.all_experts:
                    run += _again(model, groups, tokens, 1.0)
                add("forward", run, share)
                add("load", model.load(block) * work.load_share, 1.0, workers)
                add("sums", _collected(work, groups, tokens), share)
            if work.propagates and not is_last:
                if work.staged and work.collects and groups:
                    if experts and not work.all_experts:
                        add("forward", _again(model, groups, tokens, model.active_share(block)), share)
                    add("load", model.load(block) * work.load_share, 1.0, workers)
                else:
                    add("forward", model.run(block, tokens, work.length, work.batch), share)
                    add("load", model.load(block) * (2 * work.load_share), 1.0, workers)
        if solver is not None and groups and not is_outer(groups):
            weights = sum(map(_weights, groups))
            runs = partial(_run_of_sequences, work, block)
            add("solve", solver.block_cost(weights, work.sequences, runs), 1.0)
            continue
        for stage in work.stages(groups):
            solves = sorted((_solve_seconds(work, group, rates) for group in stage), reverse=True)
            busy = [0.0] * workers
            for seconds in solves:
                busy[busy.index(min(busy))] += seconds
            wall["solve"] += max(busy)
            cpu["solve"] += sum(busy)
    rotating = rotating_of(work.transforms)
    if rotating is not None and rotating.steps and work.sequences:
        parts = ceil(rotating.step_sequences / work.batch)
        add("learn rotation", _learning_step(work, rotating) * rotating.steps, ceil(parts / workers) / parts)
    guess = "; ".join(_guesses(work))
    steps += [Step(name, wall[name], cpu[name], guess=guess * (name == "solve")) for name in wall if cpu[name]]
    moved = _moved(work)
    exchanged = moved.get(BETWEEN_RANKS, 0)
    local = sum(moved.values()) - moved.get(BETWEEN, 0) - exchanged
    steps.append(Step("move and write", local / workers / rates.store, 2 * local / rates.store, written / rates.disk))
    if exchanged:
        # All ranks send at the same time.
        steps.append(Step("exchange between ranks", exchanged / workers / rates.store, exchanged / rates.store))
    if BETWEEN in moved:
        steps.append(Step("network", 0.0, 0.0, _network_bytes(work) / rates.network))
    return steps


def _run_of_sequences(work: Pass, block: int, sequences: int) -> Work:
    return work.model.run(block, sequences * work.length, work.length, work.batch)


def _learning_step(work: Pass, rotating: RotatingTransform) -> Work:
    """Work of the gradients of a step of learning a rotation: of all blocks, and of the divergence."""
    model, tokens = work.model, rotating.step_sequences * work.length
    parts = ceil(rotating.step_sequences / work.batch)
    total = model.logits(2 * tokens) * 2
    for block in range(model.blocks):
        weights = sum(map(_weights, work.layer_groups[block]))
        run = partial(_run_of_sequences, work, block, work.batch)
        # Parts of a step rotate and quantize the weights anew.
        total += (rotating.step_cost(weights, model.hidden, run) + model.load(block) * 2) * parts
    return total


def _again(model: Model, groups: Sequence[Group], tokens: int, share: float) -> Work:
    """Work of running the experts of a block once more, each on this share of the tokens."""
    weights = sum(_weights(group) for group in groups if group.is_expert)
    return Work(flops=2.0 * tokens * weights * share)


def _network_bytes(work: Pass) -> float:
    """Bytes through the busiest node's network, in or out: a solving node fetches the sums of the whole block."""
    total = 0.0
    for groups in work.layer_groups:
        sums = _sums_bytes(work, groups) * work.sent_sums
        solving = min(work.nodes, len(groups))
        total += sums * (1 - 1 / work.nodes) * max(1.0, solving / work.nodes)
    return total


def _collected(work: Pass, groups: Sequence[Group], tokens: int) -> Work:
    """Work of accumulating the Hessians of a block; an expert sees the tokens that are routed to it."""
    total = Work()
    if not work.needs_hessian:
        return Work(elements=float(sum(group.columns for group in groups) * tokens))
    experts = [group.block for group in groups if group.is_expert]
    seen = work.model.active_share(experts[0]) if experts and not work.all_experts else 1.0
    for group in groups:
        share = seen if group.is_expert else 1.0
        total += collect_work([group], tokens * share)
    passes = ceil(work.sequences / work.batch)
    return Work(total.flops, total.exact_flops, total.elements, total.launches * passes)


def _solve_seconds(work: Pass, group: Group, rates: Rates) -> float:
    return group_work(stack_of(group, work.gpu_memory), _solves(work, group)).seconds(rates)


def _solves(work: Pass, group: Group) -> list[tuple[Method, Level]]:
    """The levels at which a group is compressed, each with its method."""
    solves = [(level.method_of(work.methods), level) for level in _levels(work, group)]
    return solves if group.role is None else [(outer_method(group, method), level) for method, level in solves]


def _levels(work: Pass, group: Group) -> list[Level]:
    """The levels at which a group is compressed."""
    if work.levels is None:
        return [group.level]
    return [*group.levels] or [group.level_of(level) for level in work.levels]


def _guesses(work: Pass) -> tuple[str, ...]:
    """A note for every method that states no cost."""
    group = next((group for groups in work.layer_groups for group in groups), None)
    return () if group is None else guess_notes(_solves(work, group), stack_of(group, work.gpu_memory))
