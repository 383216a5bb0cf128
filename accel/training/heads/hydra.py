"""Hydra: Medusa's heads, each of which also reads the embeddings of the tokens that were drafted before.

Source: Ankner et al. 2024, arXiv:2402.05109, and its code, github.com/zankner/Hydra.
Departs from it: each block has its own weights, where the released code repeats those behind the first, unless
shares_blocks; a head begins as one that passes the target's hidden state on, where the paper's residual connection
begins at random; the output layers draft from a reduced vocabulary and, with shares_output, are one; the loss is the
cross-entropy with the target's own distribution, which the paper has in Hydra++ only.
Hydra's code adds the depths up without weights, hence decay=1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import check_fields
from hasten.accel.training.heads.draft_head import (
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.medusa import IdentityBlock
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss


class FirstBlock(nn.Module):
    """res_connection(x) + SiLU(linear(x)), from a hidden state and `tokens` embeddings to a hidden state."""

    def __init__(self, size: int, tokens: int) -> None:
        super().__init__()
        inputs = (tokens + 1) * size
        self.linear, self.res_connection = nn.Linear(inputs, size), nn.Linear(inputs, size)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.eye_(self.res_connection.weight[:, :size])

    def forward(self, x: Tensor) -> Tensor:
        """(…, (tokens + 1) * D) to (…, D); the hidden state comes first."""
        passed: Tensor = self.res_connection(x)
        return passed + F.silu(self.linear(x))


class HydraNetwork(DraftNetwork):
    """A head for each depth, and output layers: one for each depth, or a single one."""

    def __init__(
        self, size: int, vocabulary: DraftVocabulary, depth: int, blocks: int, outputs: int, shares_blocks: bool
    ) -> None:
        super().__init__()
        self.vocabulary, self.max_depth = vocabulary, depth
        self.heads = nn.ModuleList()
        for tokens in range(1, depth + 1):
            repeated = [IdentityBlock(size)] * (blocks - 1)
            others = repeated if shares_blocks else [IdentityBlock(size) for _ in repeated]
            self.heads.append(nn.Sequential(FirstBlock(size, tokens), *others))
        self.outputs = nn.ModuleList(nn.Linear(size, len(vocabulary)) for _ in range(outputs))

    def logits(self, inputs: Tensor, depth: int) -> Tensor:
        """(…, R) of the draft of this depth, from 1.

        inputs: (…, (depth + 1) * D), the hidden state and the embeddings of the `depth` tokens that follow it.
        """
        output = self.outputs[min(depth, len(self.outputs)) - 1]
        logits: Tensor = output(self.heads[depth - 1](inputs))
        return logits

    def encode(self, hidden: Tensor, batch: HeadBatch) -> Tensor:
        """What heads read of the hidden states (B, T, D) of windows, (B, T, D): these themselves."""
        return hidden

    def encode_last(self, states: Sequence[Any], features: Sequence[Tensor]) -> Tensor:
        """What heads read of the last of the new tokens of B sequences, (B, D)."""
        return torch.stack([new[-1] for new in features])

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Drafts of depth 1 from the last hidden states and the tokens that follow them."""
        following = self.embed(torch.stack([new[-1] for new in tokens]))
        inputs = torch.cat([self.encode_last(states, features), following], -1)
        return Frontier(self.logits(inputs, 1), torch.arange(len(inputs), device=inputs.device), 1, inputs)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """Drafts of the next depth: a node's inputs are its parent's and its own embedding."""
        depth = frontier.depth + 1
        inputs = torch.cat([frontier.carried[rows], self.embed(tokens)], -1)
        return Frontier(self.logits(inputs, depth), frontier.sequence[rows], depth, inputs)

    def inputs_of(self, batch: HeadBatch) -> list[Tensor]:
        """Inputs (B, T - 1 - d, (d + 1) * D) of each depth d if the text is drafted."""
        parts, inputs = [self.encode(batch.features, batch)], []
        embedded = self.embed(batch.tokens)
        for depth in range(1, self.max_depth + 1):
            count = batch.tokens.shape[1] - 1 - depth
            parts.append(embedded[:, depth:])
            inputs.append(torch.cat([part[:, :count] for part in parts], -1))
        return inputs


@dataclass(frozen=True)
class Hydra(DraftHead):
    """Head with `depth` drafts of `blocks` residual blocks each.

    decay: weight of a depth's loss relative to that of the one before. shares_output: whether one output layer serves
    all depths. shares_blocks: whether the blocks of a depth behind its first are one.
    """

    depth: int = 4
    blocks: int = 1
    decay: float = 1.0
    shares_output: bool = False
    shares_blocks: bool = False
    drafter: ClassVar[str] = "hydra"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("blocks", self.blocks >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """The state that the target's output layer reads."""
        return (FINAL,)

    @property
    def outputs(self) -> int:
        """Number of output layers."""
        return 1 if self.shares_output else self.depth

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> HydraNetwork:
        """The network; its heads begin by passing the hidden state on."""
        return HydraNetwork(target.hidden_size, vocabulary, self.depth, self.blocks, self.outputs, self.shares_blocks)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Output layers begin as the target's rows of the draft's vocabulary, without a bias."""
        assert isinstance(network, HydraNetwork)
        for output in network.outputs:
            assert isinstance(output, nn.Linear)
            output.weight.data.copy_(weights.output[network.vocabulary.ids])
            nn.init.zeros_(output.bias)

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Every depth from the text's tokens."""
        assert isinstance(network, HydraNetwork)
        return [network.logits(inputs, depth) for depth, inputs in enumerate(network.inputs_of(batch), 1)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy."""
        assert isinstance(network, HydraNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        for depth, inputs in enumerate(network.inputs_of(batch), 1):
            targets = batch.at_depth(depth)
            # Rows that do not count are left out before the head and its output layer, which is most of the work.
            total.add(depth, network.logits(inputs[targets.valid], depth), targets)
        return total.loss()
