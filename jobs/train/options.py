"""Options of `hasten train`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import (
    ADDRESS,
    BOS,
    BOS_CHOICES,
    DEVICES,
    DTYPES,
    MODEL,
    TEMPLATE,
    Run,
    group,
    option,
    section,
)


@dataclass
class TrainData:
    """What the target is recorded on."""

    source: list[str] = option(
        ["library"],
        "files to train on: library, or .jsonl of messages, prompts or text, .txt, .md; data=FILE for short",
    )
    sequences: int = option(256, "sequences to train on, at most", at_least=1)
    sequence_length: int = option(256, "tokens of a sequence, at most; longer texts are cut", at_least=8)
    generate: bool = option(False, "train on the target's own answers to the prompts, in place of given answers")
    prompt_length: int = option(
        0, "with generate: tokens of a plain text that the target continues; 0 records texts as they are", at_least=0
    )
    max_new_tokens: int = option(128, "tokens of an answer, at most", at_least=1)
    temperature: float = option(0.0, "temperature of answers", at_least=0)
    top: int = option(16, "most probable ids that are recorded of each token", at_least=1)
    layers: list[int] = option(
        [], "hidden states that are recorded besides the head's, for other heads; -1 is the last"
    )
    records: str | None = option(
        None, "folder where the recorded states are kept for other heads; null keeps them until the head is finished"
    )
    shard: int = option(64, "sequences of a shard, with which recording resumes", at_least=1)
    in_flight: int = option(16, "answers that are decoded at once", at_least=1)
    seed: int = option(0, "seed for drawing sequences and answers", at_least=0)


@dataclass
class HeldOutData:
    """What acceptance is measured on."""

    source: list[str] = option(
        [], "prompts, messages or text to measure on; [] is the library's held-out files, or the last sequences of data"
    )
    sequences: int = option(24, "sequences to measure on", at_least=1)
    generate: bool = option(True, "measure on the target's greedy answers, as decoding would; false: on given texts")
    prompt_length: int = option(64, "tokens of a plain text that are its prompt", at_least=1)
    max_new_tokens: int = option(64, "tokens of an answer, at most", at_least=1)
    budget: int = option(8, "drafted tokens of a pass at which heads are compared", at_least=1)


@dataclass
class TrainOptions:
    """The training."""

    epochs: float = option(2.0, "passes over the data", at_least=0.001)
    steps: int | None = option(None, "steps in place of epochs; null is epochs", at_least=1)
    window: int = option(512, "tokens of a window, into which sequences are packed", at_least=8)
    batch: int = option(4, "windows of a step", at_least=1)
    micro_batch: int | None = option(None, "windows that run at once; null is all of batch", at_least=1)
    lr: float = option(1e-3, "learning rate", at_least=1e-9)
    weight_decay: float = option(0.0, "weight decay", at_least=0)
    clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    schedule: str = option(
        "cosine", "learning-rate schedule: cosine, or wsd (stable, then decay)", choices=("cosine", "wsd")
    )
    warmup: float = option(0.03, "share of all steps with a rising rate", at_least=0, at_most=1)
    decay: float = option(
        0.2, "share of all steps with a falling rate, of wsd and of acceptance_at", at_least=0.01, at_most=1
    )
    bfloat16: bool = option(False, "products in bfloat16")
    evaluations: int = option(4, "measurements of acceptance while training", at_least=1)
    acceptance_at: list[int] = option(
        [], "numbers of training tokens at which acceptance is measured after a decay of its own, and extrapolated from"
    )
    ranks: int = option(
        1, "processes that share every batch, each with a part of it; more than one need DeepSpeed", at_least=1
    )
    zero: int = option(
        0,
        "stage of DeepSpeed's ZeRO, what the ranks divide among them: 1 the optimizer's state, 2 gradients as well, 3 "
        "weights as well",
        at_least=0,
        at_most=3,
    )
    checkpoint_seconds: float = option(120.0, "seconds between checkpoints", at_least=0)
    checkpoint_steps: int = option(0, "steps between checkpoints; 0 goes by seconds alone", at_least=0)


@dataclass
class TrainConfig(Run):
    """Train a draft head for a target on its hidden states; resumable."""

    target: str = option("embedded:target", f"target model: {MODEL}", path="in")
    head: dict[str, Any] = group("head to train")
    initial: str | None = option(
        None, "folder of a trained head that the training begins with; null begins with random weights", path="in"
    )
    draft_vocabulary: int = option(
        8192, "ids that the head drafts, the most frequent ones of the data; 0 is all", at_least=0
    )
    store: str = option(
        "bfloat16",
        "how the head's weights are stored; int8 has a scale for each row, in half the bytes",
        choices=("bfloat16", "int8"),
    )
    output: str | None = option(
        None, "folder of the trained head, in which a killed training resumes; null is head in run_dir", path="out"
    )
    overwrite: bool = option(False, "discard the output of an earlier run and start again")
    dtype: str = option("float32", "dtype of the target's arithmetic", choices=DTYPES)
    device: str = option("auto", "where target and head compute; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads", at_least=1)
    address: str | None = option(None, ADDRESS)
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    template: str | None = option(None, TEMPLATE, path="in")
    data: TrainData = section(TrainData)
    held_out: HeldOutData = section(HeldOutData)
    train: TrainOptions = section(TrainOptions)
