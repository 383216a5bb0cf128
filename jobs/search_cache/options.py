"""Options of `hasten search_cache`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import (
    BOS,
    BOS_CHOICES,
    CACHE_STATISTICS,
    MODEL,
    SOURCE,
    TEMPLATE,
    Tasks,
    group,
    option,
)


@dataclass
class SearchCacheConfig(Tasks):
    """Spread a budget of cache bytes over the layers: find a KV-cache method for each of them; resumable."""

    model: str = option("embedded:target", f"model whose cache is compressed: {MODEL}", path="in")
    levels: list[str] = option(
        ["full", "fp8", "kivi:bits=4", "kivi:bits=2", "snapkv:budget=0.25"],
        "what a layer may keep: methods of conf/cache, with hyper-parameters and a budget behind a colon",
    )
    budget: list[float] = option(
        [0.25],
        "bytes that all layers may hold for each token of the prompt, up to 1 a share of the full cache's; each gives "
        "an assignment",
    )
    allocator: dict[str, Any] = group("method that gives each layer a level within the budget")
    context: int = option(384, "tokens of the prompt", at_least=8)
    new_tokens: int = option(64, "tokens of text that are predicted behind the prompt", at_least=1)
    sequences: int = option(8, "sequences of text that levels and mixtures are compared on", at_least=1)
    evaluation_sequences: int = option(
        8, "sequences of unseen text that the assignments and the uniform levels are measured on", at_least=1
    )
    source: str = option("library", f"text: {SOURCE}; search and evaluation read parts that share nothing", path="in")
    template: str | None = option(None, TEMPLATE, path="in")
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    statistics: str | None = option(None, CACHE_STATISTICS, path="in")
    output: str | None = option(
        None,
        "folder of finished measurements; null is runs/caches/NAME. Assignments are written to run_dir",
        path="out",
    )
