"""Fields of dataclasses of options, and the options that several jobs share.

A job's own options are a dataclass in jobs/JOB/options.py, from which help, checks and Hydra's schemas are made.
Defaults are in the dataclass; conf/JOB.yaml chooses methods. Fields have types that OmegaConf supports. Modules of
options are imported for `hasten --help`, so they must import nothing heavy.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hasten.cluster.storage.naming import as_given
from hasten.jobs.common.records import Record
from hasten.jobs.common.sizes import BYTES


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    path: str | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """Field of a dataclass of options with help text and accepted values; a default list is copied for each object.

    words: texts that stand for a number, or for a number in a list, such as `auto`.

    path: set where the value is a path or URI: `in` of something that a run only reads (a name is also allowed), `out`
    of something that it writes, `state` of something that it reads and changes.
    """
    rules = {"help": text, "choices": choices, "at_least": at_least, "at_most": at_most, "path": path, "words": words}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


def group(text: str) -> Any:
    """Field whose value is a method, chosen by name from the folder conf/FIELD."""
    return field(default_factory=dict, metadata={"help": text, "group": True})


def method_list(family: str, text: str) -> Any:
    """Field whose value is a list of methods, chosen by name from the folder conf/FAMILY.

    Beside it there must be a field FAMILY, made by method_settings: their hyper-parameters are FAMILY.NAME.FIELD.
    """
    return field(default_factory=list, metadata={"help": text, "methods": family})


def method_settings() -> Any:
    """Field for the hyper-parameters that differ from their defaults, by method; see method_list."""
    return field(default_factory=dict, metadata={"hidden": True})


def section(made_by: Callable[[], Any]) -> Any:
    """Field that is itself a dataclass of options."""
    return field(default_factory=made_by)


DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
# What shares a scale of keys, of values or of queries, by the values of kv_cache.
KV_CACHES = {"fp8": "tensor", "fp8_head": "attn_head"}
ATTENTIONS = ("fp8",)
ADDRESS = "Ray cluster to join, or auto for the one that runs here; null starts one for the job"
WORKER_GPUS = "GPUs of each worker, such as 0.5 if two share one; null is one if device is cuda, else none"
WORKER_MEMORY = f"memory that Ray reserves for each worker, {BYTES}; null reserves none"
GROUP_SIZE = "input columns that share a scale; auto is the largest of 128, 64 and 32 that divides the layer's columns"
MODEL = (
    "embedded:target, embedded:draft, embedded:recall, a transformers checkpoint (folder or URI), a GGUF file, or a "
    "name on the Hugging Face hub"
)
CACHE_STATISTICS = (
    "calibrated statistics of the cache's method, a file or folder that `hasten calibrate_cache` wrote; null looks in "
    "the model's folder, and where there are none they come from each prompt; prompt always takes them from there"
)
FORMATS = ("compressed_tensors", "gguf")
FORMAT = (
    "what is written: a checkpoint for transformers and vLLM, or model.gguf for llama.cpp, for which bits stand for "
    "q2_k, q3_k, q4_k, q5_k, q6_k and q8_0"
)
_GGUF_TYPE = "a level such as q6_k, or f16, bf16, f32"
GATE = (
    "limits that end the run with exit code 3 where they are not kept, on metrics of the report (kl, top1, perplexity, "
    "bits, …) or on the change of a task of lm-eval against the original: 'gate=[kl<0.05,top1>0.9,task:arc_easy>-0.01]'"
)
BOS_CHOICES = ("auto", "true", "false")
BOS = (
    "windows of text begin with the begin-of-text token, as context that is not scored; auto: where the tokenizer adds "
    "it before a text by itself"
)
TEMPLATE = "Jinja chat template for records with messages; null is the tokenizer's own"
SOURCE = (
    "library (this Python's own sources), a .npy, .txt, .md, .jsonl or .parquet file or its URI, "
    "hub:NAME[:split[:field]], or a mixture mix:SOURCE:WEIGHT+SOURCE:WEIGHT"
)


@dataclass
class Calibration:
    """Tokens of the calibration."""

    source: str = option("library", f"text that the calibration tokens come from: {SOURCE}", path="in")
    sequences: int = option(128, "calibration sequences", at_least=1)
    sequence_length: int = option(512, "tokens in a calibration sequence, with those that begin it", at_least=2)
    packing: str = option(
        "stream",
        "what a sequence holds: stream, a window of the documents behind each other; documents, whole documents, each "
        "with positions and attention of its own",
        choices=("stream", "documents"),
    )
    seed: int = option(0, "seed for drawing sequences from the source", at_least=0)
    batch: int = option(4, "sequences that run through a block at once", at_least=1)
    shards: int = option(8, "chunks of the sequences; at most as many calibrators share them", at_least=1)
    expert_tokens: int = option(128, "experts that saw fewer tokens are rounded to nearest", at_least=0)
    all_experts: bool = option(
        False, "statistics of every expert of a mixture are of all tokens, and not only of those that are routed to it"
    )


class Sampled(Protocol):
    """Options of windows that are drawn from a text."""

    source: str | None
    sequences: int
    sequence_length: int
    seed: int


@dataclass
class Evaluation:
    """Tokens that quality is measured on."""

    source: str | None = option(
        None,
        f"text that quality is measured on: {SOURCE}; null is a part of the calibration's text that nothing else reads",
        path="in",
    )
    sequences: int = option(32, "evaluation sequences; 0 measures nothing", at_least=0)
    sequence_length: int = option(512, "tokens in a window, with those that begin it", at_least=2)
    stride: int | None = option(
        None, "tokens between the starts of two windows, overlap is context only; null is sequence_length", at_least=1
    )


@dataclass
class Tracking:
    """Options of MLflow's tracking."""

    uri: str | None = option(None, "MLflow tracking URI; null is a sqlite file in runs/")
    experiment: str = option("hasten", "MLflow experiment")
    name: str | None = option(None, "name of the MLflow run; null names it by job and time")
    system_seconds: float = option(
        10.0, "seconds between samples of CPU, memory, network and GPU usage; 0 takes none", at_least=0
    )
    register: str | None = option(None, "registered model in MLflow whose next version the run's output becomes")


@dataclass
class TargetGroup:
    """A target that is divided over several devices."""

    size: int = option(1, "ranks that a worker's target is divided over, an actor each, all on one node", at_least=1)
    mode: str = option(
        "tensor_parallel",
        "how: tensor_parallel gives every rank a part of each layer's work; zero3 gives it a part of the weights, and "
        "collects a block's weights when it runs",
        choices=("tensor_parallel", "zero3"),
    )
    offload: str | None = option(
        None, "where zero3 holds the weights: null is the device, cpu main memory, or a folder on an NVMe disk"
    )


@dataclass
class CalibratorGroup(TargetGroup):
    """A group of calibrators that divide every block between them."""

    size: int = option(1, "ranks of a worker, an actor each, all on one node, that share every block", at_least=1)
    mode: str = option(
        "zero3",
        "how: zero3 gives every rank a part of a block's weights, and collects a layer's weight for its product",
        choices=("zero3", "tensor_parallel"),
    )
    offload: str | None = option(
        None, "where a rank holds its part of a block: null is the device, cpu main memory; size=1 may offload, too"
    )


@dataclass
class Run:
    """Options of every job."""

    run_dir: str | None = option(
        None, "folder for config, log, report and plots; null is runs/JOB/DATE_TIME", path="out"
    )
    cache_folder: str | None = option(
        None,
        "folder for local copies of inputs and outputs given by URI, visible to all nodes of a cluster; null is "
        "HASTEN_CACHE, or ~/.cache/hasten",
    )
    seed: int = option(0, "seed of everything random that has no seed of its own", at_least=0)
    tracking: Tracking = section(Tracking)


@dataclass
class Tasks(Run):
    """Options of jobs that run a model in tasks which do not depend on each other."""

    dtype: str = option("float32", "dtype of the arithmetic", choices=DTYPES)
    device: str = option("auto", "where the tasks compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(
        2, "tasks at a time, a process each; their number changes the time and not the output", at_least=1
    )
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)


@dataclass
class SummedTasks(Tasks):
    """Options of jobs whose tasks sum over parts of calibration text."""

    source: str = option("library", f"text that the calibration tokens come from: {SOURCE}", path="in")
    sequences: int = option(16, "calibration sequences", at_least=1)
    sequence_length: int = option(512, "tokens in a calibration sequence, with those that begin it", at_least=8)
    template: str | None = option(None, TEMPLATE, path="in")
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    shards: int = option(4, "parts of the sequences, a task each; a finished part is not computed again", at_least=1)
    batch: int = option(4, "sequences that run through a block at once", at_least=1)


@dataclass
class GgufFile:
    """The GGUF file that format=gguf writes."""

    output_type: str = option(
        "q6_k", f"type of the output layer, and of the embedding where both are one tensor: {_GGUF_TYPE}"
    )
    embedding_type: str = option("q6_k", f"type of the embedding: {_GGUF_TYPE}")
    pre_tokenizer: str | None = option(
        None, "llama.cpp's name of how the tokenizer splits text, such as llama-bpe; null finds it in tokenizer.json"
    )


@dataclass
class Calibrated(Run):
    """Options of every job that calibrates a checkpoint block by block."""

    ignore: list[str] = option(
        [],
        "regular expressions of module names left as they are; embedding and output layer have options of their own",
    )
    skip_first: int = option(0, "blocks left as they are at the start", at_least=0)
    skip_last: int = option(0, "blocks left as they are at the end", at_least=0)
    propagate: str = option(
        "sequential",
        "what layers are calibrated on: sequential, outputs of all compressed layers before them, in one pass over the "
        "text; quantized, of the compressed blocks before theirs, in two passes and less memory; original, of the "
        "original blocks, which makes all blocks independent",
        choices=("sequential", "quantized", "original"),
    )
    transforms: list[str] = method_list(
        "transform",
        "changes of every block before its layers are compressed, in this order, such as [smoothquant,gptaq]; a level "
        "database is transformed for its reference level",
    )
    transform: dict[str, Any] = method_settings()
    input_observer: dict[str, Any] = group("how a static scale of a layer's inputs is chosen, for levels that have one")
    kv_cache: str | None = option(
        None,
        "calibrated scales of an FP8 cache: fp8, one for a block's keys and one for its values; fp8_head, one for each "
        "KV head; null leaves the cache to the server",
        choices=tuple(KV_CACHES),
    )
    attention: str | None = option(
        None,
        "fp8: queries are rounded to FP8, too, with calibrated scales of the kind of kv_cache, which it needs",
        choices=ATTENTIONS,
    )
    dtype: str = option(
        "auto", "dtype of the arithmetic; auto is bfloat16 where the hardware is fast in it", choices=DTYPES
    )
    device: str = option("auto", "where the actors compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(2, "actors, a process each; their number changes the time and not the output", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    template: str | None = option(None, TEMPLATE, path="in")
    calibration: Calibration = section(Calibration)


def plain(config: Run) -> Record:
    """Config as nested dictionaries, for config.yaml, report.json and MLflow, with the user's URIs."""
    settings: Record = as_given(dataclasses.asdict(config))
    return settings
