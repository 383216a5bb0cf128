"""Hidden transfer: in the middle of the target, linear maps of a token's state stand for the states of coming tokens.

Source: Wu et al. 2024, arXiv:2404.12022. The pseudo state of the token that is i ahead enters at the layer t_i, attends
to the context and to the pseudo states before it, and goes through the remaining layers.
Departs from it: in the target's pass, rows of pseudo states run through the layers below t_i as well, with states that
nothing reads; all maps are trained at once, where the paper trains one after the other; the target's distribution is
that of its recorded most probable ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.decoding.targets.virtual import VirtualTokens, entering
from hasten.accel.errors import UserError, check_fields
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.virtual import VirtualHead, VirtualNetwork, WindowContext
from hasten.accel.training.heads.vocabulary import DraftVocabulary


class TransferredStates(VirtualTokens):
    """Virtual tokens whose states are maps of the state of the node that they hang on. layers: t_i of each."""

    def __init__(self, maps: nn.ModuleList, layers: Sequence[int]) -> None:
        self.layers, self._maps = layers, maps

    def states(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Each token's own map of its anchor."""
        states = torch.empty(anchors.shape, device=anchors.device)
        for number in numbers.unique().tolist():
            rows = numbers == number
            states[rows] = self._maps[number](anchors[rows].float())
        return states


class HiddenTransferNetwork(VirtualNetwork):
    """A map (D, D) for each position; enter: numbers of layers that the positions skip, ascending."""

    def __init__(self, vocabulary: int, enter: Sequence[int], size: int) -> None:
        super().__init__(vocabulary, len(enter), 1)
        self.enter = tuple(enter)
        self.maps = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in enter)
        for map in self.maps:
            assert isinstance(map, nn.Linear)
            nn.init.eye_(map.weight)

    def virtual(self) -> TransferredStates:
        """The pseudo states."""
        return TransferredStates(self.maps, self.enter)

    def hidden_layers(self) -> Sequence[int]:
        """The layers at which pseudo states enter."""
        return sorted(set(self.enter))

    def states(self, context: WindowContext, anchors: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """They enter at their layers; below them they are zeros, which nothing reads."""
        decoder = self.frozen.model.get_decoder()
        changes = {layer: partial(self._with_pseudo, context, anchors, layer) for layer in self.hidden_layers()}
        size = self.frozen.model.config.get_text_config().hidden_size
        rows = torch.zeros(*positions.shape, size, device=positions.device)
        with entering(decoder.layers, changes):
            out = decoder(
                inputs_embeds=rows,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=context.cache,
                use_cache=True,
            )
        states: Tensor = out.last_hidden_state
        return states

    def _with_pseudo(self, context: WindowContext, anchors: Tensor, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states (B, N * m, D) before a layer, with the pseudo states that enter at it."""
        own = context.hidden[layer]
        known = own.gather(1, anchors[..., None].expand(-1, -1, own.shape[-1]))  # (B, N, D)
        parts = list(hidden.unflatten(1, (anchors.shape[1], self.max_depth)).unbind(2))
        for position, enters in enumerate(self.enter):
            if enters == layer:
                parts[position] = self.maps[position](known)
        return torch.stack(parts, 2).flatten(1, 2)


@dataclass(frozen=True)
class HiddenTransfer(VirtualHead):
    """`depth` pseudo states. enter: number of layers that each skips, ascending; () is half of the target's for all."""

    depth: int = 3
    enter: tuple[int, ...] = ()
    drafter: ClassVar[str] = "hidden_transfer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "enter", tuple(self.enter))
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("anchors", self.anchors >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
            (
                "enter",
                len(self.enter) in (0, self.depth) and list(self.enter) == sorted(self.enter),
                f"[] or depth={self.depth} numbers of layers in ascending order",
            ),
        )

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> HiddenTransferNetwork:
        """Maps that are the identity; they draft from all ids of the target, whatever the vocabulary."""
        enter = self.enter or (target.layers // 2,) * self.depth
        if not 0 <= min(enter) <= max(enter) < target.layers:
            raise UserError(f"enter={list(enter)} is wrong: expected numbers from 0 to {target.layers - 1}")
        return HiddenTransferNetwork(target.vocabulary, enter, target.hidden_size)
