"""Cost of training: the embedded models from scratch, and the heads of drafters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.accel.costs.decoding import pass_work
from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model
from hasten.accel.costs.ranks import DEEPSPEED_BYTES

# Weights, gradients, the optimizer's state, and concatenated gradients for averaging.
_COPIES_OF_WEIGHTS = 5
# Vectors of a token that every block keeps for the backward pass, of the hidden size and of the inner size.
_KEPT_NARROW, _KEPT_WIDE = 12, 5
_LOGIT_COPIES, _HEAD_LOGIT_COPIES = 3, 6


@dataclass(frozen=True)
class Training:
    """A model that is trained from scratch. stages: (blocks, tokens). batch: sequences of a step, of all workers."""

    name: str
    hidden: int
    inner: int
    attention: int
    key_values: int
    vocabulary: int
    stages: Sequence[tuple[int, int]]
    batch: int
    length: int

    def elements(self, blocks: int) -> int:
        """Number of parameters of the model with `blocks` blocks, whose head is tied to its embedding."""
        block = (
            self.hidden * (2 * self.attention + 2 * self.key_values) + 3 * self.hidden * self.inner + 2 * self.hidden
        )
        return blocks * block + self.vocabulary * self.hidden + self.hidden


def pretrain(trainings: Sequence[Training], workers: int, threads: int, rates: Rates) -> Estimate:
    """Estimate of training the models one after the other."""
    host: dict[str, dict[str, int]] = {}
    steps: list[Step] = []
    written: dict[str, int] = {}
    moved: dict[str, int] = {}
    for training in trainings:
        deepest = training.stages[-1][0]
        elements = training.elements(deepest)
        tokens = -(-training.batch // workers) * training.length
        kept = tokens * deepest * (_KEPT_NARROW * training.hidden + _KEPT_WIDE * training.inner) * 4
        host[training.name] = {
            "process": rates.worker_bytes,
            "weights, gradients, optimizer": 4 * elements * _COPIES_OF_WEIGHTS,
            "activations": kept,
            "logits": tokens * training.vocabulary * 4 * _LOGIT_COPIES,
        }
        work = 0.0
        for blocks, seen in training.stages:
            flops = 6.0 * seen * training.elements(blocks) + 12.0 * seen * training.length * training.attention * blocks
            small = seen * blocks * (40 * training.hidden + 12 * training.inner) + seen * 10 * training.vocabulary
            work += Work(flops=flops, elements=small).seconds(rates)
        steps.append(Step(f"train the {training.name}", rates.start + work / workers, workers * rates.start + work))
        written[f"{training.name} checkpoint"] = 2 * elements
        written[f"{training.name} state"] = 4 * elements * 3
        total = sum(seen for _, seen in training.stages)
        moved[f"{training.name} gradients"] = (
            0 if workers == 1 else 2 * 4 * elements * (workers - 1) * -(-total // (training.batch * training.length))
        )
    processes = (
        Process("trainer", workers, threads, host),
        Process("driver", 1, 0, {"run": {"process": rates.driver_bytes}}),
    )
    return Estimate(processes, tuple(steps), {name: size for name, size in moved.items() if size}, 0, written)


@dataclass(frozen=True)
class HeadTraining:
    """A draft head that is trained on what its target computed.

    parameters: of the network. depth: drafts of a token. vocabulary: ids that it drafts. passes: how often a token goes
    through the network while it is trained; target_passes: through the target. recorded: tokens that the target runs
    over; answered: those of them that it decodes one by one, with in_flight sequences at once. bytes_per_token: of a
    record. steps: of training, with `batch` windows of `window` tokens, of which micro_batch run at once. measured:
    held-out tokens, drafted `evaluations` times. stored: bytes of a stored parameter. ranks: processes of the group
    that trains; 0 is the process that records. zero: stage of ZeRO.
    """

    parameters: int
    depth: int
    vocabulary: int
    passes: float
    target_passes: float
    recorded: int
    answered: int
    in_flight: int
    bytes_per_token: int
    steps: int
    batch: int
    micro_batch: int
    window: int
    measured: int
    evaluations: int
    stored: int
    ranks: int = 0
    zero: int = 0


def train_head(target: Model, head: HeadTraining, threads: int, rates: Rates, gpus: int = 0) -> Estimate:
    """Estimate of recording the target and training a head on the records."""
    ranks = max(1, head.ranks)
    tokens = head.micro_batch // ranks * head.window
    weights = target.elements() * target.dtype.itemsize
    longest = head.recorded // max(1, head.in_flight)
    record = {
        "target": weights,
        "target's caches": head.in_flight * target.token_bytes * min(longest, head.window),
        "logits": head.in_flight * target.vocabulary * 4 * _LOGIT_COPIES,
        "records of a shard": head.bytes_per_token * head.in_flight * head.window,
    }
    kept = _KEPT_NARROW * target.hidden + _KEPT_WIDE * target.inner
    train = {
        # The target's embedding and output layer in float32, which heads begin with.
        "embeddings": 2 * 4 * target.vocabulary * target.hidden,
        "weights, gradients, optimizer": _copies_in_a_rank(head, ranks),
        "activations": int(4 * tokens * head.passes * kept),
        "logits": 4 * tokens * head.depth * head.vocabulary * _LOGIT_COPIES,
        "batch": tokens * head.bytes_per_token * 2,
    }
    if head.target_passes:
        train["target"] = 4 * target.elements()
    phases = {"record": record} if head.ranks else {"record": record, "train": train}
    processes = [_process("driver", 1, phases, rates.driver_bytes, threads, rates, gpus)]
    if head.ranks:
        train["DeepSpeed"] = DEEPSPEED_BYTES
        processes.insert(0, _process("rank", ranks, {"train": train}, rates.worker_bytes, threads, rates, gpus))
    trained = head.steps * head.batch * head.window
    drafts = head.measured * head.evaluations
    drafting = Work(memory_bytes=4.0 * head.parameters * max(1, head.depth // 2), launches=60.0 * head.depth)
    measuring = drafting * drafts
    if head.target_passes:
        measuring += pass_work(target, 1, 1 + head.depth, head.window) * drafts
    work = {
        "record the target": _recording(target, head),
        "train the head": _through_target(target, head, trained)
        + Work(
            flops=6.0 * trained * head.parameters * head.passes,
            elements=trained * head.passes * (3 * kept + 6 * head.vocabulary),
            launches=head.steps * 600.0 * head.passes,
        ),
        "measure acceptance": measuring,
    }
    steps = []
    for name, part in work.items():
        seconds = part.seconds(rates)
        steps.append(Step(name, seconds / ranks if name == "train the head" else seconds, seconds))
    # Every step sums the gradients, which a ring sends around twice; with ZeRO-3 weights are collected twice, too.
    sent = 4 * head.parameters * (ranks - 1) * (2 + 2 * (head.zero == 3)) * head.steps
    moved = {"between ranks": sent} if sent else {}
    written = {
        "records": head.recorded * head.bytes_per_token,
        "head": head.stored * head.parameters,
        "checkpoint": 4 * 4 * head.parameters,
    }
    return Estimate(tuple(processes), tuple(step for step in steps if step.seconds), moved, 0, written)


def _process(
    kind: str,
    count: int,
    phases: Mapping[str, Mapping[str, int]],
    imports: int,
    threads: int,
    rates: Rates,
    gpus: int,
) -> Process:
    """Processes whose phases are in main memory, or on a GPU each. imports: bytes of a process after its imports."""
    if not gpus:
        host = {name: {"process": imports, **parts} for name, parts in phases.items()}
        return Process(kind, count, threads, host)
    device = {name: {"context": rates.device_bytes, **parts} for name, parts in phases.items()}
    return Process(kind, count, threads, {"run": {"process": imports}}, gpus, device)


def _copies_in_a_rank(head: HeadTraining, ranks: int) -> int:
    """Bytes of weights, gradients and the optimizer's state in a rank, of which ZeRO's stage divides a part."""
    # Both moments of Adam; then the gradients; then the weights.
    divided = (0, 2, 3, 4)[head.zero]
    # From stage 1 on, a rank also has a float32 copy of its part of the weights.
    copied = 1 if head.zero else 0
    return int(4 * head.parameters * (_COPIES_OF_WEIGHTS - divided + (divided + copied) / ranks))


def _through_target(target: Model, head: HeadTraining, trained: int) -> Work:
    """Work of the target's passes while the head is trained on `trained` tokens."""
    work = Work()
    for index in range(target.blocks if head.target_passes else 0):
        work += target.run(index, trained, head.window, head.micro_batch) * head.target_passes
    return work


def _recording(target: Model, head: HeadTraining) -> Work:
    """Work of the target over all records: passes over given tokens, and one pass for each token of the answers."""
    work = Work()
    given = head.recorded - head.answered
    for index in range(target.blocks if given else 0):
        work += target.run(index, given, head.window, 1)
    if given:
        work += target.logits(given)
    if head.answered:
        # A pass decodes a token of every sequence.
        work += pass_work(target, head.in_flight, 1, head.window // 2) * (head.answered / head.in_flight)
    return work


def train_drafter(
    target: Model,
    draft: Model,
    sequences: int,
    length: int,
    batch: int,
    epochs: int,
    parameters: int,
    examples_per_token: float,
    rates: Rates,
    gpus: int = 0,
) -> Estimate:
    """Estimate of running both models on the texts and training a head.

    parameters: number of the head's parameters. examples_per_token: share of the tokens that become examples.
    """
    models = {
        "target": target.elements() * target.dtype.itemsize,
        "draft model": draft.elements() * draft.dtype.itemsize,
    }
    logits = batch * length * target.vocabulary * 4 * _HEAD_LOGIT_COPIES
    examples = int(sequences * length * examples_per_token * draft.hidden * draft.dtype.itemsize)
    read = {**models, "logits": logits, "examples": 2 * examples, "activations": target.activation_bytes(batch, length)}
    train = {"examples": examples, "head": 16 * parameters}
    if gpus:
        host = {"read": {"process": rates.driver_bytes, "examples": 2 * examples}}
        device = {"read": {"context": rates.device_bytes, **read}}
    else:
        host = {"read": {"process": rates.driver_bytes, **read}, "train": {"process": rates.driver_bytes, **train}}
        device = {}
    work = Work()
    tokens = sequences * length
    for model, times in ((target, 1), (draft, 2)):
        for index in range(model.blocks):
            work += model.run(index, tokens, length, batch) * times
        work += model.logits(tokens) * times
    work += Work(elements=20 * tokens * target.vocabulary)
    trained = epochs * tokens * examples_per_token
    fit = Work(flops=6.0 * trained * parameters, launches=trained / 256 * 120)
    steps = tuple(
        Step(name, part.seconds(rates), part.seconds(rates)) for name, part in (("read", work), ("train", fit))
    )
    return Estimate((Process("driver", 1, 1, host, gpus, device),), steps, {}, 0, {"head": 4 * parameters})
