"""Linear layers of a block that are never compressed: routers, gates, and step sizes of state-space models.

They are small, and what they compute decides which weights are used or how far a state reaches back, so that servers
run them in full precision.
"""

from collections.abc import Mapping

from torch import nn

ROUTER = "a router: it chooses experts"
GATE = "a gate of few rows"
STEP = "it computes step sizes or decay of a state"
# Last parts of the names of layers that compute how fast states of linear attention and state-space models change.
_STEPS = ("in_proj_ba", "in_proj_a", "in_proj_b", "dt_proj", "a_proj", "b_proj")
# A gate has a row for the layer, or for each head or expert.
_GATES = ("gate", "router", "shared_expert_gate", "weights_proj")


def reason_to_skip(path: str, layer: nn.Linear, mixtures: Mapping[str, int]) -> str | None:
    """Why a layer of a block is not compressed; None for others.

    mixtures: number of experts of each module that holds the experts of a layer, by its path.
    """
    parent, _, leaf = path.rpartition(".")
    if any(
        parent == mixture.rpartition(".")[0] and layer.out_features == number for mixture, number in mixtures.items()
    ):
        return ROUTER
    holders = {mixture.rpartition(".")[0] for mixture in mixtures}
    if parent.rpartition(".")[2] in _GATES and parent.rpartition(".")[0] in holders:
        return ROUTER
    if leaf in _GATES or layer.out_features == 1:
        return GATE
    return STEP if leaf in _STEPS else None
