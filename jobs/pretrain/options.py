"""Options of `hasten pretrain`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import MODEL, Run, option, section


@dataclass
class Training:
    """Shape and schedule of one model that is trained from nothing."""

    hidden_size: int = option(256, "width", at_least=1)
    intermediate_size: int = option(896, "width inside the feed-forward layers", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    kv_heads: int = option(2, "key-value heads", at_least=1)
    head_dim: int = option(64, "size of a head", at_least=2)
    depths: list[list[int]] = option([], "stages [layers, tokens]; the last one has all layers")
    batch: int = option(16, "sequences per step, over all workers", at_least=1)
    sequence_length: int = option(512, "tokens in a sequence", at_least=2)
    lr: float = option(6e-3, "learning rate of the matrices (Muon)", at_least=0)
    embedding_lr: float = option(5e-3, "learning rate of embedding and norms (AdamW)", at_least=0)
    weight_decay: float = option(0.05, "weight decay of the matrices", at_least=0)
    warmup_steps: int = option(40, "steps of rising learning rate", at_least=1)
    decay: float = option(0.4, "share of all steps, at the end, of falling learning rate", at_least=0, at_most=1)


@dataclass
class RecallTraining:
    """What is fine-tuned on recall tasks, and for how long."""

    base: str = option("embedded:target", f"Llama-style model that is fine-tuned: {MODEL}", path="in")
    stages: list[list[int]] = option(
        [],
        "stages [tokens of a sequence, tokens of a context and its questions, steps]; with a fourth number, positions "
        "that a sequence is spread over",
    )
    rope_theta: float | None = option(
        100000.0,
        "base of the rotary embedding's frequencies: a larger one than the base model's keeps the angles of long "
        "contexts among those that it knows; null leaves it",
        at_least=1,
    )
    batch: int = option(4096, "tokens per step", at_least=64)
    lr: float = option(2e-3, "learning rate of the matrices (Muon)", at_least=0)
    norm_lr: float = option(1e-3, "learning rate of the norms (AdamW)", at_least=0)
    weight_decay: float = option(0.01, "weight decay of the matrices", at_least=0)
    text_weight: float = option(0.3, "weight of the loss on text; that on answers has 1", at_least=0)
    warmup_steps: int = option(20, "steps of rising learning rate", at_least=1)
    decay: float = option(0.35, "share of all steps, at the end, of falling learning rate", at_least=0, at_most=1)
    contexts: list[int] = option([384, 1920], "tokens of the contexts that recall is measured with")
    samples: int = option(16, "samples of each task, of each of these lengths", at_least=1)


@dataclass
class PretrainConfig(Run):
    """Train the embedded models, tokenizer, target, draft and recall variant, from the standard library; resumable."""

    models: list[str] = option(
        ["target", "draft"],
        "which of target, draft and recall to train; recall is the target, fine-tuned on the tasks of `hasten cache`",
    )
    vocab_size: int = option(4096, "entries of the byte-level BPE tokenizer", at_least=258, at_most=65536)
    library: str | None = option(
        None, "folder of .py files to train on; null is this Python's standard library", path="in"
    )
    output: str = option(
        "runs/models/embedded", "folder of the trained checkpoints and the state to resume from", path="out"
    )
    overwrite: bool = option(False, "discard the output of an earlier training and start again")
    workers: int = option(2, "processes that share every step", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    target: Training = section(Training)
    draft: Training = section(Training)
    recall: RecallTraining = section(RecallTraining)
