"""Cost of training: the embedded models from scratch, and the heads of drafters."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model

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
