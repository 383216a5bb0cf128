"""Options of `hasten train_drafter`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, SOURCE, TEMPLATE, Run, group, option, section


@dataclass
class DrafterText:
    """Tokens that a drafter's network is trained on."""

    source: str = option("library", f"text to train on: {SOURCE}", path="in")
    sequences: int = option(512, "sequences to train on", at_least=1)
    held_out: int = option(64, "sequences to measure on; of the library from its held-out files", at_least=1)
    sequence_length: int = option(256, "tokens in a sequence", at_least=2)
    seed: int = option(0, "seed for drawing sequences from the source", at_least=0)
    batch: int = option(8, "sequences that run through the models at once", at_least=1)


@dataclass
class TrainDrafterConfig(Run):
    """Train the head that a drafter needs, for one target and one draft model."""

    target: str = option("embedded:target", f"target model: {MODEL}", path="in")
    draft: str = option("embedded:draft", f"draft model with the target's tokenizer: {MODEL}", path="in")
    head: dict[str, Any] = group("head to train")
    drafter: str | None = option(None, "drafter that the head must be for; null accepts any")
    blocks: int | None = option(None, "head.blocks, where the head has them; null is head's own", at_least=0)
    mixing: float | None = option(
        None, "head.mixing, where the head has it; null is head's own", at_least=0, at_most=0.99
    )
    reject_weight: float | None = option(
        None, "head.reject_weight, where the head has it; null is head's own", at_least=0.01
    )
    epochs: int | None = option(None, "head.epochs, passes over the tokens; null is head's own", at_least=1)
    lr: float | None = option(None, "head.lr, the learning rate; null is head's own", at_least=1e-9)
    batch: int | None = option(None, "head.batch, tokens a step; null is head's own", at_least=1)
    dtype: str = option("float32", "dtype of the models' arithmetic", choices=DTYPES)
    device: str = option("auto", "where the models compute; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads", at_least=1)
    template: str | None = option(None, TEMPLATE, path="in")
    output: str | None = option(
        None, "file of the trained network, must be new; null is the head's usual name in run_dir", path="out"
    )
    text: DrafterText = section(DrafterText)
