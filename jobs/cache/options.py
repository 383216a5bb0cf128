"""Options of `hasten cache`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import (
    BOS,
    BOS_CHOICES,
    CACHE_STATISTICS,
    MODEL,
    SOURCE,
    TEMPLATE,
    Tasks,
    option,
)
from hasten.jobs.common.sizes import BYTES


@dataclass
class CacheConfig(Tasks):
    """Measure KV-cache methods on text and on recall: quality, bytes held at every step, speed; resumable."""

    model: str = option("embedded:recall", f"model whose caches are compressed: {MODEL}", path="in")
    method: list[str] = option(
        ["snapkv"],
        "methods of conf/cache, each with hyper-parameters behind a colon: [snapkv,kivi:bits=4,kivi:bits=2]; the full "
        "cache is measured, too",
    )
    budget: list[float] = option(
        [0.5],
        "tokens that each layer may hold, up to 1 a share of the sequence, for methods that have a budget; each is a "
        "row and a point of the figure",
    )
    statistics: str | None = option(None, CACHE_STATISTICS, path="in")
    budget_bytes: list[str] = option(
        [], f"more budgets, as bytes that all layers may hold of a sequence, {BYTES}, for methods that free memory"
    )
    tasks: list[str] = option(
        ["text", "needle", "keys", "joint", "repeated", "multi_turn"],
        "what is measured: text, divergence from the full cache; the others, recall of what stands in the context",
    )
    context: int = option(384, "tokens of the prompt", at_least=8)
    new_tokens: int = option(64, "tokens of text that are predicted behind the prompt, one at a time", at_least=1)
    sequences: int = option(4, "sequences of text", at_least=1)
    samples: int = option(8, "samples of each recall task", at_least=1)
    source: str = option("library", f"text, also between the needles: {SOURCE}", path="in")
    template: str | None = option(None, TEMPLATE, path="in")
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    output: str | None = option(None, "folder of the finished rows; null is runs/caches/NAME", path="out")
    overwrite: bool = option(False, "measure again what an earlier run has measured")
