"""The baseline of a search: random search over the same moves, with as many measured tokens."""

from collections.abc import Mapping

import yaml

from hasten.accel.compression.search.evopress import EvoPress
from hasten.accel.compression.search.random_search import RandomSearch

_OPTION = "allocator."


def random_search_options(evopress: Mapping[str, object], available: int) -> dict[str, object]:
    """Options of `hasten search` for a random search that measures as many tokens as EvoPress, to within a candidate.

    evopress: options of `hasten search`, of which those of the allocator count. available: tokens of the search's
    sequences. Each candidate is measured on the tokens of EvoPress's last step. All candidates make one round: the
    evaluators run once what candidates of a round share.
    """
    fields = {
        name.removeprefix(_OPTION): yaml.safe_load(str(value))
        for name, value in evopress.items()
        if name.startswith(_OPTION)
    }
    method = EvoPress(**fields)
    tokens = method.tokens[-1]
    # The start is measured, too.
    candidates = max(1, round(method.measured_tokens(available) / min(tokens, available)) - 1)
    search = RandomSearch(rounds=1, candidates=candidates, tokens=tokens)
    return {
        "allocator": "random_search",
        "allocator.rounds": search.rounds,
        "allocator.candidates": search.candidates,
        "allocator.tokens": search.tokens,
    }
