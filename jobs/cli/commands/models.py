"""Which models can be compressed: tries types of transformers with tiny random models, or describes a checkpoint."""

from collections.abc import Iterable, Iterator

from hasten.jobs.cli.commands._arguments import Parser

_EXAMPLES = """
examples:
  hasten models cohere2 smollm3      tries two model types
  hasten models                      tries all, in about a minute
  hasten models /models/llama        blocks of a checkpoint, layers that share an input, what is left out and why
"""


def main(words: list[str]) -> int:
    """0; 1 where a type was named that cannot be compressed."""
    parser = Parser("models", f"{(__doc__ or '').strip()}\n{_EXAMPLES}")
    parser.add_argument("names", metavar="NAME", nargs="*", help="model types, or one checkpoint (default: all types)")
    names = parser.parse_args(words).names
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    from hasten.accel.models.trial import model_types, try_type

    known = model_types()
    if len(names) == 1 and names[0] not in known and not names[0].isidentifier():
        print("\n".join(_described(names[0])))
        return 0
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(
            f"NAME={unknown[0]!r} is no language model of transformers {transformers.__version__} and no checkpoint: "
            "hasten models lists all"
        )
    refused = 0
    for name in names or known:
        trial = try_type(name)
        refused += bool(trial.reason)
        text = trial.reason or _summary(trial.linears, trial.skipped)
        print(f"{name:28} {'no ' if trial.reason else 'yes'}  {text}", flush=True)
    return 1 if names and refused else 0


def _summary(linears: int, skipped: Iterable[tuple[str, str]]) -> str:
    reasons = dict.fromkeys(reason for _, reason in skipped)
    left = "".join(f"; left out: {_paths(skipped, reason)} ({reason})" for reason in reasons)
    return f"{linears} linear layers{left}"


def _paths(skipped: Iterable[tuple[str, str]], reason: str) -> str:
    return ", ".join(path for path, other in skipped if other == reason)


def _described(model: str) -> Iterator[str]:
    from hasten.accel.costs.outline import open_checkpoint
    from hasten.accel.models.adapter import InputGroup
    from hasten.accel.models.architecture import Architecture
    from hasten.accel.models.checkpoint import resolve

    architecture = Architecture(open_checkpoint(resolve(model, weights=False)))
    adapter = architecture.adapter
    yield f"{model}: model_type={architecture.checkpoint.config.get('model_type')}"
    yield f"blocks: {architecture.num_blocks}, {architecture.block_start(0).removesuffix('0.')}*"
    yield f"embedding: {architecture.embedding_name()}"
    yield f"output layer: {architecture.head_name()}, behind {', '.join(adapter.tail) or 'nothing'}"
    scales = {"input_scale": adapter.input_scale, "logit_scale": adapter.logit_scale, "cap": adapter.cap}
    changed = [f"{name}={value:g}" for name, value in scales.items() if value not in (1.0, None)]
    if changed:
        yield f"logits: {', '.join(changed)}"
    kinds: dict[object, list[int]] = {}
    for index in range(architecture.num_blocks):
        layout = architecture.layout(index)
        kinds.setdefault((layout.order, tuple(layout.skipped.items())), []).append(index)
    for blocks in kinds.values():
        layout = architecture.layout(blocks[0])
        yield f"in {len(blocks)} blocks, first {blocks[0]}, in the order in which they run:"
        for item in layout.order:
            if isinstance(item, InputGroup):
                norm = f" behind {item.norm}" if item.norm else ""
                yield f"  {', '.join(item.paths)}{norm}"
            else:
                yield f"  experts of {item.path}"
        for path, reason in layout.skipped.items():
            yield f"  left out: {path} ({reason})"
