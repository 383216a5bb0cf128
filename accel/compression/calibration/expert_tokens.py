"""How many calibration tokens the experts of mixtures saw, for reports."""

from collections.abc import Iterable, Mapping
from statistics import median

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.result import Facts


def expert_tokens(
    layer_groups: Iterable[Iterable[Group]], facts: Iterable[Facts], enough: int
) -> dict[str, object] | None:
    """Tokens in the statistics of the experts of each block and of all blocks; None where there are no experts.

    facts: rows of the layers, of which each has the number of its tokens. enough: experts with fewer are counted as
    `below`, because they are compressed without statistics.
    """
    layers = {
        layer.name: (group.block, layer.expert)
        for groups in layer_groups
        for group in groups
        for layer in group.layers
        if layer.expert is not None
    }
    tokens: dict[int, dict[int | None, int]] = {}
    for row in facts:
        if row["layer"] in layers:
            block, expert = layers[row["layer"]]
            tokens.setdefault(block, {})[expert] = row["tokens"]
    if not tokens:
        return None
    every = [count for counts in tokens.values() for count in counts.values()]
    blocks = [{"block": block, **_summary(list(tokens[block].values()), enough)} for block in sorted(tokens)]
    return {**_summary(every, enough), "enough": enough, "blocks": blocks}


def described(summary: Mapping[str, object]) -> str:
    """The summary in words."""
    return (
        f"least {summary['least']}, median {summary['median']:g}, most {summary['most']}; {summary['below']} of "
        f"{summary['experts']} experts saw fewer than {summary['enough']}"
    )


def _summary(counts: list[int], enough: int) -> dict[str, object]:
    return {
        "experts": len(counts),
        "least": min(counts),
        "median": median(counts),
        "most": max(counts),
        "below": sum(count < enough for count in counts),
    }
