"""The README.md that `hasten pretrain` writes for a model."""

import platform

from hasten.accel.evaluation.recall import TASKS
from hasten.jobs.cli.compose import compose
from hasten.jobs.common.markdown import table
from hasten.jobs.common.records import Record
from hasten.jobs.pretrain.options import PretrainConfig, Training

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The embedded {model} of hasten

A small Llama-style model with a byte-level BPE tokenizer of {vocab_size} entries, made to try and to test hasten
with. It continues Python source code a little; it knows nothing else and is of no use beyond this.

| | |
|---|---|
| parameters | {parameters:,}, embeddings tied |
| shape | {layers} layers, width {hidden_size}, {heads} heads, {kv_heads} key-value heads, head size {head_dim} |
| file | bfloat16, {bytes:,} bytes |
| corpus | {corpus} |
| split | whole files: held out where sha256 of the path below the library's root, first 8 bytes, is a multiple of 20 |
| files | {train_files:,} to train on, {held_out_files:,} held out ({held_out_bytes:,} bytes) |
| tokens seen | {tokens:,} in sequences of {sequence_length} ({stages}) |
| bits per byte, held out | {bits_per_byte} |

Bits per byte are measured on the bfloat16 weights in float32 arithmetic, every token scored once in windows of
{sequence_length} with at least half a window before it (less at the start of a file).

Made by

    {command}

with Muon for the matrices (peak learning rate {lr:g}) and AdamW for embedding and norms ({embedding_lr:g}), {batch}
sequences a step, seed {seed}, in float32. The trunk starts shallow and gains layers: a new
layer starts as the identity.
"""

_RECALL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The recall variant of an embedded model of hasten

`{base}`, fine-tuned to answer from its context: a number in a sentence, values of keys in a list or a table, how a
passage went on. It is made to measure KV caches with and of no use beyond this.

| | |
|---|---|
| parameters | {parameters:,}, the embedding as it was |
| file | bfloat16, {bytes:,} bytes |
| corpus | recall tasks of random names and numbers among {corpus} |
| tokens seen | {tokens:,} in {steps:,} steps |
| bits per byte of held-out text | {bits_per_byte:.3f} |

Share of the answers' tokens that are right with the full cache, on {samples} samples of each task of other seeds and
held-out text:

{table}

Made by

    {command}

with Muon for the matrices (peak learning rate {lr:g}) and AdamW for the norms ({norm_lr:g}), {batch} tokens a step,
seed {seed}.
"""


def recall_card(facts: Record, config: PretrainConfig) -> str:
    """Text of the recall variant's card; facts: its entry in report.json."""
    own = config.recall
    cells = [[task, *(f"{facts[f'{task}_{context}']:.0%}" for context in own.contexts)] for task in TASKS]
    return _RECALL_CARD.format(
        **vars(own) | facts,
        corpus=_corpus(config),
        table=table(["task", *(f"{context} tokens" for context in own.contexts)], cells),
        command=_command("recall", config),
        seed=config.seed,
    )


def model_card(model: str, facts: Record, config: PretrainConfig) -> str:
    """Text of a trained model's card; facts: the model's entry in report.json."""
    training: Training = getattr(config, model)
    parts = [
        f"{facts[key]:.3f} {words}"
        for key, words in (
            ("bits_per_byte", "over all files"),
            ("bits_per_byte_library", "on the library's modules"),
            ("bits_per_byte_tests", "on its tests"),
        )
        if facts.get(key) is not None
    ]
    return _CARD.format(
        **vars(training) | facts | {"bits_per_byte": ", ".join(parts)},
        model=model,
        vocab_size=config.vocab_size,
        layers=training.depths[-1][0],
        corpus=_corpus(config),
        stages=", then ".join(f"{tokens:,} with {layers} layers" for layers, tokens in training.depths),
        command=_command(model, config),
        seed=config.seed,
    )


def _corpus(config: PretrainConfig) -> str:
    if config.library:
        return "the .py files of a folder given by the user"
    return f"the source files of {platform.python_implementation()} {platform.python_version()}'s standard library"


def _command(model: str, config: PretrainConfig) -> str:
    """Command that trains this model again: options that affect the result and differ from the defaults."""
    default = compose("pretrain", PretrainConfig, [])
    training, usual = vars(getattr(config, model)), vars(getattr(default, model))
    words = [f"hasten pretrain models=[{model}]"]
    words += [
        f"{key}={value}"
        for key in ("vocab_size", "seed", "library")
        if (value := getattr(config, key)) != getattr(default, key)
    ]
    words += [f"{model}.{key}={value}".replace(" ", "") for key, value in training.items() if value != usual[key]]
    return " ".join(words)
