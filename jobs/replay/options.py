"""Options of `hasten replay`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, SOURCE, Run, group, option


@dataclass
class ReplayConfig(Run):
    """Measure what a drafter would be worth on a text or on recorded completions, without decoding."""

    text: str = option("library", f"held-out text that plays the target's greedy completions: {SOURCE}", path="in")
    recorded: str | None = option(None, "JSON Lines that hasten decode wrote, in place of text", path="in")
    target: str = option("embedded:target", f"whose tokenizer the text is read with: {MODEL}", path="in")
    draft: str | None = option(
        "embedded:draft", f"small model of the same tokenizer, for the drafters that need one: {MODEL}", path="in"
    )
    drafter: dict[str, Any] = group("how tokens are drafted")
    budgets: list[int] = option([8, 16, 32], "tokens drafted at most for a step, each a row of the table")
    sequences: int = option(16, "sequences of the text", at_least=1)
    sequence_length: int = option(256, "tokens in a sequence of the text", at_least=2)
    prompt_length: int = option(64, "of which so many are the prompt", at_least=1)
    memory: str | None = option(
        None, "file of what the drafter learned in hasten decode, which it starts from", path="in"
    )
    path: str = option(
        "auto",
        "how the draft model runs: as transformers has it, or faster if Llama-like",
        choices=("auto", "transformers", "llama"),
    )
    dtype: str = option(
        "auto", "dtype of the arithmetic; auto is bfloat16 where the machine multiplies it fast", choices=DTYPES
    )
    device: str = option("auto", "where a draft model computes; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads of the process", at_least=1)
