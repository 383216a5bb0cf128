"""The options of every job: one dataclass a job, from which help, checks and Hydra's schemas are made.

Defaults live here; conf/JOB.yaml holds choices. Fields keep to the types that OmegaConf checks. This module is read
for `hasten --help` and imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    path: str | None = None,
) -> Any:
    """Field of a job's dataclass with its help text and what is accepted; a default list is copied for every object.

    path: the value is a path or URI, perhaps a name of something else: that is only read (`in`), that a run makes
    (`out`), or that it both reads and changes (`state`).
    """
    rules = {"help": text, "choices": choices, "at_least": at_least, "at_most": at_most, "path": path}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


def group(text: str) -> Any:
    """Field whose value is chosen by name from the folder conf/FIELD."""
    return field(default_factory=dict, metadata={"help": text, "group": True})


def section(made_by: Callable[[], Any]) -> Any:
    """Field that is a dataclass of options itself."""
    return field(default_factory=made_by)


DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
ADDRESS = "Ray cluster to join, or auto for the one that runs here; null starts one for the job"
MODEL = "embedded:target, embedded:draft, a transformers checkpoint (folder or URI), or a name on the Hugging Face hub"
BYTES = "bytes such as 80GB or 512MiB"
SOURCE = "library (this Python's own sources), a .npy, .txt, .md or .jsonl file or its URI, or hub:NAME[:split[:field]]"


@dataclass
class Calibration:
    """Tokens that the quantizer sees."""

    source: str = option("library", f"text that the calibration tokens come from: {SOURCE}", path="in")
    sequences: int = option(128, "calibration sequences", at_least=1)
    sequence_length: int = option(512, "tokens in a calibration sequence", at_least=2)
    seed: int = option(0, "which sequences of the source are drawn", at_least=0)
    batch: int = option(4, "sequences that run through a block at once", at_least=1)
    shards: int = option(8, "chunks that the sequences are cut into; as many calibrators can share them", at_least=1)
    expert_tokens: int = option(128, "experts that saw fewer tokens are rounded to nearest", at_least=0)


@dataclass
class Evaluation:
    """Tokens that quality is measured on."""

    source: str = option("library", f"held-out text that quality is measured on: {SOURCE}", path="in")
    sequences: int = option(32, "evaluation sequences; 0 measures nothing", at_least=0)
    sequence_length: int = option(512, "tokens in a window", at_least=2)
    stride: int | None = option(
        None, "tokens between two windows, those seen before are context only; null is sequence_length", at_least=1
    )


@dataclass
class Tracking:
    """Where MLflow keeps the run."""

    uri: str | None = option(None, "MLflow tracking URI; null is a sqlite file in runs/")
    experiment: str = option("hasten", "MLflow experiment")
    name: str | None = option(None, "name of the MLflow run; null names it by job and time")
    system_seconds: float = option(
        10.0, "seconds between samples of the use of CPUs, memory, network and GPUs; 0 takes none", at_least=0
    )
    register: str | None = option(None, "registered model in MLflow whose next version the run's output becomes")


@dataclass
class Run:
    """What every job has."""

    run_dir: str | None = option(
        None, "folder for config, log, report and figures; null is runs/JOB/DATE_TIME", path="out"
    )
    cache: str | None = option(
        None,
        "folder for copies of what is read and written by URI, on a cluster one that all nodes see; null is "
        "HASTEN_CACHE, or ~/.cache/hasten",
    )
    seed: int = option(0, "seed of everything random that has no seed of its own", at_least=0)
    tracking: Tracking = section(Tracking)


@dataclass
class Calibrated(Run):
    """What every job has that calibrates a checkpoint block by block."""

    ignore: list[str] = option(
        [], "regular expressions of module names left as they are; embeddings and lm_head are never quantized"
    )
    skip_first: int = option(0, "blocks left as they are at the start", at_least=0)
    skip_last: int = option(0, "blocks left as they are at the end", at_least=0)
    propagate: str = option(
        "quantized",
        "whose output the next block is calibrated on; with original all blocks are independent",
        choices=("quantized", "original"),
    )
    dtype: str = option(
        "auto", "dtype of the arithmetic; auto is bfloat16 where the machine multiplies it fast", choices=DTYPES
    )
    device: str = option("auto", "where the actors compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(2, "actors, a process each; they change the time and not a byte", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    address: str | None = option(None, ADDRESS)
    calibration: Calibration = section(Calibration)


@dataclass
class CompressConfig(Calibrated):
    """Quantize a checkpoint on a local or remote Ray cluster; started again, it goes on where it was stopped."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    level: str | None = option(
        None,
        "name of a level of any kind, such as w4g128, c2.5 or s50; what no loader reads packed lies dense in the "
        "checkpoint, and bits_per_weight counts the level; null is bits, group_size and symmetric",
    )
    quantizer: dict[str, Any] = group("how the codes of a layer are chosen")
    column_quantizer: dict[str, Any] = group("how a layer's bits are spread over its columns, for levels like c2.5")
    pruner: dict[str, Any] = group("which weights of a layer are zeroed, for levels like s50")
    bits: int = option(4, "bits of a quantized weight", at_least=2, at_most=8)
    group_size: int = option(128, "input columns that share a scale; -1 is one scale a row", at_least=-1)
    symmetric: bool = option(False, "no zero points")
    output: str | None = option(None, "folder of the compressed checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
    evaluation: Evaluation = section(Evaluation)


@dataclass
class LevelOptions(Calibrated):
    """What decides a level database."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    quantizer: dict[str, Any] = group("how the codes of a layer are chosen")
    bits: list[int] = option([2, 3, 4, 5, 6, 8], "bits of a weight, each with each of group_sizes a level; [] is none")
    group_sizes: list[int] = option([128], "input columns that share a scale; -1 is one scale a row")
    symmetric: bool = option(
        True, "no zero points; transformers loads mixed levels with zero points only if all are the same"
    )
    column_quantizer: dict[str, Any] = group(
        "how a layer's bits are spread over its columns, where there are column_bits"
    )
    column_bits: list[float] = option(
        [],
        "average bits of a layer's columns, which get whole bits of their own, each a level; stored so in the level "
        "database, dense in the checkpoint",
    )
    pruner: dict[str, Any] = group("which weights of a layer are zeroed, where there are sparsities")
    sparsities: list[float] = option([], "shares of a layer's weights that are zeroed, each a level")
    extra_levels: list[str] = option([], "names of further levels, of any kind, such as w4g64a, c2.5 or s50")
    reference: int = option(
        3,
        "bits of the level whose output the next block is calibrated on; without bits it is the lowest sparsity, "
        "without those the most column_bits, without these the last of extra_levels",
        at_least=2,
        at_most=8,
    )


@dataclass
class LevelsConfig(LevelOptions):
    """Quantize every layer at every level, for searches to choose from; started again, it goes on where it stopped."""

    output: str | None = option(None, "folder of the level database; null is runs/levels/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")


@dataclass
class SearchTokens:
    """Tokens that candidates are compared on."""

    source: str = option("library", f"text that candidates are compared on: {SOURCE}", path="in")
    sequences: int = option(64, "sequences that the samples are drawn from", at_least=1)
    sequence_length: int = option(512, "tokens in a sequence", at_least=2)
    error_sequences: int = option(
        8, "of the sequences, those on which errors=kl and kl_scaled measure layers alone", at_least=1
    )
    seed: int = option(1, "which sequences of the source are drawn", at_least=0)
    batch: int = option(1, "sequences that run through a block at once; more pay on a GPU", at_least=1)


@dataclass
class SearchConfig(LevelOptions):
    """Spend a budget of bits over the layers: make the levels, choose among them, write the checkpoint; resumable."""

    budget: list[float] = option(
        [3.2], "average bits of a quantized weight, scales counted; a list gives a table of all allocators"
    )
    allocator: dict[str, Any] = group("how the budget is spread")
    grouping: str = option(
        "serving",
        "which layers get the same level: with serving those that servers fuse (q/k/v, gate/up, experts)",
        choices=("none", "serving"),
    )
    keep: bool = option(False, "layers may also stay as they are, at the bits of the checkpoint")
    drop: list[str] = option([], "parts of a block that may be left out: attention, mlp, block")
    errors: str = option(
        "kl_scaled",
        "what allocators that add up errors go by: each layer's output error; the KL divergence of every level alone, "
        "or that of one level of each layer, carried to the others by the output errors",
        choices=("output", "kl", "kl_scaled"),
    )
    fitness: dict[str, Any] = group("what a search compares candidates by")
    compare: list[str] = option(
        [], "allocators in the table that a list of budgets gives, with their own defaults; [] is all that there are"
    )
    levels: str | None = option(
        None,
        "folder of a finished level database, whose levels count; null makes the one in runs/levels/NAME",
        path="in",
    )
    output: str | None = option(None, "folder of the checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
    search: SearchTokens = section(SearchTokens)
    evaluation: Evaluation = section(Evaluation)


@dataclass
class EvaluateConfig(Run):
    """Measure a checkpoint: perplexity, divergence from the original, exact bits per weight, bytes."""

    model: str = option("embedded:target", f"what to measure, compressed or not: {MODEL}", path="in")
    original: str | None = option(
        None, "uncompressed checkpoint to compare with; null is the one that a compressed checkpoint names", path="in"
    )
    tasks: list[str] = option([], "tasks of lm-eval to run, which needs the extra hasten[eval]")
    dtype: str = option("float32", "dtype of the arithmetic", choices=DTYPES)
    device: str = option("auto", "where to compute; auto is cuda where there is one", choices=DEVICES)
    batch: int = option(8, "sequences that are run at once", at_least=1)
    workers: int = option(2, "processes that share the sequences", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    address: str | None = option(None, ADDRESS)
    evaluation: Evaluation = section(Evaluation)


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
    draft_tokens: int | None = option(
        None, "tokens drafted for a pass; 0 decodes without drafts, null sizes drafts by measurement", at_least=0
    )
    max_draft_tokens: int = option(32, "tokens drafted for a pass at most, where they are measured", at_least=1)
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
    address: str | None = option(None, ADDRESS)


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


@dataclass
class Training:
    """Shape and schedule of one model that is trained from nothing."""

    hidden_size: int = option(256, "width", at_least=1)
    intermediate_size: int = option(896, "width inside the feed-forward layers", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    kv_heads: int = option(2, "key-value heads", at_least=1)
    head_dim: int = option(64, "size of a head", at_least=2)
    depths: list[list[int]] = option([], "stages [layers, tokens]; the last one has all layers")
    batch: int = option(16, "sequences a step, over all workers", at_least=1)
    sequence_length: int = option(512, "tokens in a sequence", at_least=2)
    lr: float = option(6e-3, "learning rate of the matrices (Muon)", at_least=0)
    embedding_lr: float = option(5e-3, "learning rate of embedding and norms (AdamW)", at_least=0)
    weight_decay: float = option(0.05, "weight decay of the matrices", at_least=0)
    warmup_steps: int = option(40, "steps of rising learning rate", at_least=1)
    decay: float = option(0.4, "share of all steps, at the end, of falling learning rate", at_least=0, at_most=1)


@dataclass
class PretrainConfig(Run):
    """Train the embedded models, tokenizer, target and draft, from the standard library's source files; resumable."""

    models: list[str] = option(["target", "draft"], "which of target and draft to train")
    vocab_size: int = option(4096, "entries of the byte-level BPE tokenizer", at_least=258, at_most=65536)
    library: str | None = option(
        None, "folder of .py files to train on; null is this Python's standard library", path="in"
    )
    output: str = option(
        "runs/models/embedded", "folder of the trained checkpoints and the state to resume from", path="out"
    )
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier training's, and start again")
    workers: int = option(2, "processes that share every step", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    target: Training = section(Training)
    draft: Training = section(Training)


@dataclass
class DrafterText:
    """Tokens that a drafter's network is trained on."""

    source: str = option("library", f"text to train on: {SOURCE}", path="in")
    sequences: int = option(512, "sequences to train on", at_least=1)
    held_out: int = option(64, "sequences to measure on; of the library from its held-out files", at_least=1)
    sequence_length: int = option(256, "tokens in a sequence", at_least=2)
    seed: int = option(0, "which sequences of the source are drawn", at_least=0)
    batch: int = option(8, "sequences that run through the models at once", at_least=1)


@dataclass
class TrainDrafterConfig(Run):
    """Train the network that a drafter needs, for one target and one draft model."""

    target: str = option("embedded:target", f"model that is to be sped up: {MODEL}", path="in")
    draft: str = option("embedded:draft", f"smaller model of the same tokenizer: {MODEL}", path="in")
    drafter: str = option(
        "specdec_pp", "what to train: of specdec_pp the head that predicts acceptance", choices=("specdec_pp",)
    )
    blocks: int = option(3, "residual blocks of the head", at_least=0)
    mixing: float = option(
        0.15, "share of the text's own tokens that stay, all others are the draft model's", at_least=0, at_most=0.99
    )
    reject_weight: float = option(6.0, "weight of the loss on rejections", at_least=0.01)
    epochs: int = option(3, "passes over the tokens", at_least=1)
    lr: float = option(1e-3, "learning rate, which rises at first and falls as a cosine", at_least=1e-9)
    batch: int = option(256, "tokens a step", at_least=1)
    dtype: str = option("float32", "dtype of the models' arithmetic", choices=DTYPES)
    device: str = option("auto", "where the models compute; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads", at_least=1)
    output: str | None = option(
        None, "file of the trained network, must be new; null is acceptance_head.safetensors in run_dir", path="out"
    )
    text: DrafterText = section(DrafterText)


@dataclass
class BenchConfig(Run):
    """Run a benchmark by name and print its table."""

    model: str = option("embedded:target", f"what the benchmark runs on: {MODEL}", path="in")
    threads: int = option(1, "threads of every process", at_least=1)


@dataclass
class SweepConfig:
    """How the points of `hasten JOB --multirun` are chosen and run; on the command line each has `sweep.` before it."""

    sampler: str = option(
        "auto",
        "how points are chosen: grid takes all, the others are Optuna's; auto is grid where every option has a list, "
        "else tpe, or nsgaii for several metrics",
        choices=("auto", "grid", "tpe", "nsgaii", "random"),
    )
    trials: int = option(20, "points that Optuna chooses", at_least=1)
    metrics: list[str] = option([], "metrics that Optuna optimises and tables show first, names as in report.json")
    directions: list[str] = option([], "minimize or maximize, for each of metrics; [] is what is usual for each")
    at_once: int | None = option(None, "points that run at the same time at most; null is as many as fit", at_least=1)
    retries: int = option(3, "times that a point starts again after its process or node died", at_least=0)
    seed: int = option(0, "seed of Optuna's sampler", at_least=0)
    address: str | None = option(None, f"{ADDRESS}; for all points, whose own addresses do not count")
    cpus: int | None = option(
        None,
        "CPUs that a Ray started for the sweep offers, more or fewer than there are; null is what the machine has",
        at_least=1,
    )


@dataclass
class PlanConfig:
    """The cluster that `hasten plan JOB` and `plan=true` plan for; on the command line each has `plan.` before it.

    What is null is this machine's, measured; of GPUs that are not here, and of networks, something usual is assumed.
    """

    nodes: int = option(1, "nodes, all alike", at_least=1)
    cpus: int | None = option(None, "processors of a node", at_least=1)
    memory: str | None = option(None, f"of a node: {BYTES}; null is what is free here")
    gpus: int | None = option(None, "GPUs of a node; null is those here", at_least=0)
    gpu_memory: str | None = option(None, f"of a GPU: {BYTES}; null is 80GB where there is none here")
    disk: str | None = option(None, f"free where outputs go: {BYTES}; null is what is free here")
    network: str | None = option(None, f"between two nodes, a second: {BYTES}; null is 1.25GB, 10 Gbit/s")
    disk_speed: str | None = option(None, f"written and read in a second: {BYTES}")
    memory_speed: str | None = option(None, f"copied by a process, or in a GPU's memory, in a second: {BYTES}")
    flops: float | None = option(None, "FLOP/s of a process in the job's dtype, such as 4e14", at_least=1)
    exact_flops: float | None = option(None, "FLOP/s of a process in float32", at_least=1)
    launch: float | None = option(None, "seconds of the smallest operation, such as 5e-6", at_least=1e-9)
    tokens_per_pass: float = option(
        1.0, "tokens that a pass of decoding gives, which no plan knows before; 1 is without drafts", at_least=1
    )


JOBS: dict[str, type[Run]] = {
    "compress": CompressConfig,
    "levels": LevelsConfig,
    "search": SearchConfig,
    "evaluate": EvaluateConfig,
    "decode": DecodeConfig,
    "replay": ReplayConfig,
    "pretrain": PretrainConfig,
    "train_drafter": TrainDrafterConfig,
    "bench": BenchConfig,
}
