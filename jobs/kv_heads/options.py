"""Options of `hasten kv_heads`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import MODEL, SummedTasks, option


@dataclass
class KVHeadsConfig(SummedTasks):
    """Join heads of keys and values of a checkpoint, whose caches become as many times smaller; resumable."""

    model: str = option("embedded:target", f"model whose heads are joined: {MODEL}", path="in")
    group: int = option(2, "KV heads that become one", at_least=2)
    keys: str = option(
        "directions",
        "what a group's keys become: directions, of their largest part on calibration text; or their mean",
        choices=("directions", "mean"),
    )
    output: str | None = option(None, "folder of the checkpoint; null is runs/kv_heads/NAME-GROUP", path="out")
    overwrite: bool = option(False, "start again where an earlier run with other settings has begun")
