"""Options of `hasten replay`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import BOS, BOS_CHOICES, DEVICES, DTYPES, MODEL, SOURCE, TEMPLATE, Run, group, option


@dataclass
class ReplayConfig(Run):
    """Measure a drafter's acceptance on a text or on recorded completions, without decoding."""

    text: str = option("library", f"held-out text that stands for the target's greedy completions: {SOURCE}", path="in")
    template: str | None = option(None, TEMPLATE, path="in")
    recorded: str | None = option(None, "JSON Lines that hasten decode wrote, in place of text", path="in")
    target: str = option("embedded:target", f"model whose tokenizer encodes the text: {MODEL}", path="in")
    draft: str | None = option(
        "embedded:draft", f"draft model with the target's tokenizer, for drafters that need one: {MODEL}", path="in"
    )
    drafter: dict[str, Any] = group("method that drafts tokens")
    budgets: list[int] = option([8, 16, 32], "maximum numbers of tokens drafted per step, each a row of the table")
    sequences: int = option(16, "sequences of the text", at_least=1)
    sequence_length: int = option(256, "tokens in a sequence of the text, with those that begin it", at_least=2)
    prompt_length: int = option(64, "tokens of each sequence that are the prompt", at_least=1)
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    memory: str | None = option(
        None, "file of the drafter's learned state, saved by hasten decode, to start from", path="in"
    )
    path: str = option(
        "auto",
        "implementation of the draft model: transformers' own, or a faster one, fast (llama is its older name); auto "
        "is fast for the families that it runs",
        choices=("auto", "transformers", "fast", "llama"),
    )
    dtype: str = option(
        "auto", "dtype of the arithmetic; auto is bfloat16 where the hardware is fast in it", choices=DTYPES
    )
    device: str = option("auto", "where a draft model computes; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads of the process", at_least=1)
