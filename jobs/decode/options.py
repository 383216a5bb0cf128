"""Options of `hasten decode`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import (
    ADDRESS,
    CACHE_STATISTICS,
    DEVICES,
    DTYPES,
    MODEL,
    TEMPLATE,
    WORKER_GPUS,
    WORKER_MEMORY,
    Run,
    TargetGroup,
    group,
    option,
    section,
)
from hasten.jobs.common.sizes import BYTES


@dataclass
class DecodeConfig(Run):
    """Complete prompts by speculative decoding on a local or remote Ray cluster; resumable."""

    target: str = option("embedded:target", f"target model, compressed or not: {MODEL}", path="in")
    draft: str | None = option(
        "embedded:draft", f"draft model with the target's tokenizer, for drafters that need one: {MODEL}", path="in"
    )
    drafter: dict[str, Any] = group("method that drafts tokens")
    verifier: dict[str, Any] = group("rule by which the target accepts drafted tokens")
    prompts: str | None = option(
        None,
        "JSON Lines with a prompt (text, token ids, messages, or the fields of instruction data) and an id; null takes "
        "files of the standard library",
        path="in",
    )
    prompt_field: str = option("prompt", "key of the prompt in a line; another than prompt is read alone")
    id_field: str = option("id", "key of the id in a line; a line without it is identified by its number")
    template: str | None = option(None, TEMPLATE, path="in")
    special_tokens: bool = option(
        False, "names of special tokens in plain prompts, such as <|im_end|>, are these tokens"
    )
    output: str | None = option(None, "JSON Lines of the results; null is completions.jsonl in run_dir", path="out")
    overwrite: bool = option(False, "discard the output of an earlier run and start again")
    max_new_tokens: int = option(128, "maximum tokens of a completion", at_least=1)
    temperature: float = option(0.0, "sampling temperature; 0 is greedy decoding", at_least=0)
    top_k: int = option(0, "sample from this many most probable tokens; 0 is all", at_least=0)
    top_p: float = option(1.0, "sample from the most probable tokens, up to this probability", at_least=0, at_most=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that occurred before less probable", at_least=0)
    stop: list[int] = option([], "token ids that end a completion, in addition to the model's own")
    stop_strings: list[str] = option([], "texts that end a completion, whose own text ends before them")
    ignore_eos: bool = option(False, "the model's own end tokens and the chat template's do not end a completion")
    draft_length: dict[str, Any] = group("policy for the number of tokens drafted per target pass")
    draft_tokens: int | None = option(
        None,
        "shorthand for draft_length=fixed draft_length.tokens=N; 0 decodes without drafts; null follows draft_length",
        at_least=0,
    )
    max_draft_tokens: int = option(32, "maximum tokens drafted per target pass, if draft_length adapts", at_least=1)
    in_flight: int = option(8, "prompts that a worker decodes at once; 1 has the lowest latency", at_least=1)
    prefill_chunk: int = option(512, "tokens of a prompt per prefill pass", at_least=1)
    memory_bytes: int | None = option(
        None,
        "bytes that a worker may use for KV caches and logits of target and draft model; null is no limit",
        at_least=1,
    )
    stream: bool = option(False, "print tokens as they are decoded, one prompt after the other, on one worker")
    memory: str | None = option(
        None,
        "file of the drafter's learned state, loaded at the start if it exists and saved at the end",
        path="state",
    )
    placement: str = option(
        "auto",
        "private drafters in every worker, or shared ones in actors; auto shares drafters that learn, if it pays",
        choices=("auto", "shared", "private"),
    )
    drafter_actors: int = option(1, "actors that run shared drafters", at_least=1)
    path: str = option(
        "auto",
        "implementation of the models: transformers' own, or a faster one, fast (its older name: llama); auto is "
        "fast for the families that it runs",
        choices=("auto", "transformers", "fast", "llama"),
    )
    cache: dict[str, Any] = group("what the KV cache of the target keeps, and how")
    cache_budget: float | None = option(
        None,
        "tokens of a sequence that each layer's cache may hold, up to 1 a share of the sequence, for methods that drop "
        "tokens",
        at_least=0,
    )
    cache_statistics: str | None = option(None, CACHE_STATISTICS, path="in")
    cache_budget_bytes: str | None = option(
        None, f"the same as bytes that all layers may hold of a sequence, {BYTES}, in place of cache_budget"
    )
    compiled: bool = option(False, "compile the fast path, once for every size of a draft; on a GPU as CUDA graphs")
    dtype: str = option(
        "auto",
        "dtype of the arithmetic; auto is bfloat16 on a GPU, and the faster dtype on a CPU with bfloat16 units",
        choices=DTYPES,
    )
    check_prompts: int = option(
        8, "greedy completions in a reduced dtype that are checked against float32 logits for ties", at_least=0
    )
    device: str = option("auto", "where the actors compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(1, "actors that run the target, a process each", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)
    target_group: TargetGroup = section(TargetGroup)
