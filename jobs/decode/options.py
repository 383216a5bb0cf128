"""Options of `hasten decode`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import (
    ADDRESS,
    DEVICES,
    DTYPES,
    MODEL,
    WORKER_GPUS,
    WORKER_MEMORY,
    Run,
    group,
    option,
)


@dataclass
class DecodeConfig(Run):
    """Complete prompts by speculative decoding on a local or remote Ray cluster; resumable."""

    target: str = option("embedded:target", f"whose completions they are, compressed or not: {MODEL}", path="in")
    draft: str | None = option(
        "embedded:draft", f"small model of the same tokenizer, for the drafters that need one: {MODEL}", path="in"
    )
    drafter: dict[str, Any] = group("how tokens are drafted")
    verifier: dict[str, Any] = group("how the target accepts them")
    prompts: str | None = option(
        None,
        "JSON Lines with a prompt (text, or a list of token ids) and an id; null is the standard library's files",
        path="in",
    )
    prompt_field: str = option("prompt", "what the prompt is called in a line")
    id_field: str = option("id", "what the id is called in a line; without one it is the line's number")
    output: str | None = option(None, "JSON Lines of the results; null is completions.jsonl in run_dir", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
    max_new_tokens: int = option(128, "tokens of a completion at most", at_least=1)
    temperature: float = option(0.0, "0 takes the most probable token", at_least=0)
    top_k: int = option(0, "draw from so many tokens only; 0 is all", at_least=0)
    top_p: float = option(1.0, "draw from the most probable tokens that have this probability", at_least=0, at_most=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that were there before less probable", at_least=0)
    stop: list[int] = option([], "token ids that end a completion, beside the model's own")
    ignore_eos: bool = option(False, "the model's own ids do not end a completion")
    draft_length: dict[str, Any] = group("how many tokens are drafted for a pass of the target")
    draft_tokens: int | None = option(
        None,
        "short for draft_length=fixed draft_length.tokens=N; 0 decodes without drafts, null is what draft_length says",
        at_least=0,
    )
    max_draft_tokens: int = option(32, "tokens drafted for a pass at most, where draft_length adapts", at_least=1)
    in_flight: int = option(8, "prompts that a worker decodes at once; 1 is fastest for each of them", at_least=1)
    prefill_chunk: int = option(512, "tokens of a prompt that are read at once", at_least=1)
    memory_bytes: int | None = option(
        None, "bytes that a worker's target may take for caches and logits; null is no bound", at_least=1
    )
    stream: bool = option(False, "print tokens as they come, one prompt after the other, by one worker")
    memory: str | None = option(
        None,
        "file of what the drafter learned: it starts from it, where there is one, and writes it at the end",
        path="state",
    )
    placement: str = option(
        "auto",
        "where drafters are: in every worker, or in actors that serve all; auto shares those that learn, where it pays",
        choices=("auto", "shared", "private"),
    )
    drafter_actors: int = option(1, "actors of shared drafters", at_least=1)
    path: str = option(
        "auto",
        "how the models run: as transformers has them, or faster if Llama-like",
        choices=("auto", "transformers", "llama"),
    )
    compiled: bool = option(False, "compile the fast path, which takes a while for every size of a draft")
    dtype: str = option(
        "auto",
        "dtype of the arithmetic; auto is bfloat16 on a GPU, on a CPU with units for it whatever decodes quicker",
        choices=DTYPES,
    )
    check_prompts: int = option(
        8, "greedy completions in a reduced dtype that are checked against float32 logits for ties", at_least=0
    )
    device: str = option("auto", "where the actors compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(1, "actors with the target, a process each", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)
