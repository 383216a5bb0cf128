"""Chimera: a layer over the target's states and trigrams of tokens takes the place of the target's next states.

Source: Zeng et al. 2024, arXiv:2402.15758 (Chimera), and its code, github.com/kafkayu/Chimera.
Departs from it: a token attends to the trigrams of the context and of its path at every depth, where the code replaces
the context's by those of drafts of the same depth; the drafts of training are the text's tokens, where the code takes
the head's own, and the gradient of a depth reaches the ones before; the cross-entropy is that with the target's own
distribution; the distance of states, which the code computes for the first depth and leaves out of its loss, is part of
it at all depths; trigrams are encoded when they are met, and not looked up; those at the start of a text have zeros in
place of the tokens that are missing; the output layers draft from a reduced vocabulary.

Trigram encoder: the embeddings of the last three tokens give a vector that depends on nothing else. Full-context
encoder: one decoder layer in which a trigram attends to the target's states and to the trigrams up to its own. Its
output stands for the state that the target would have there, and is attended to as such by the next depth. Residual
decoding heads: the output layer of a depth reads the encoder's output next to the target's last state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import check_fields
from hasten.accel.training.division import mean
from hasten.accel.training.heads.attention import DecoderLayer, KeyValueCache, block_causal
from hasten.accel.training.heads.draft_head import (
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.eagle import attend_unrolled
from hasten.accel.training.heads.medusa import IdentityBlock
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss

_GRAM = 3


@dataclass
class _Sequence:
    """cache: keys and values of states and of trigrams. recent: embeddings (2, D) of the last tokens; None at first."""

    recent: Tensor | None = None
    cache: KeyValueCache = field(default_factory=KeyValueCache)

    @property
    def length(self) -> int:
        """Number of states that were read; there are as many trigrams."""
        return self.cache.length // 2


@dataclass
class _Nodes:
    """What M nodes carry. hidden: (M, D), the target's last state. output: (M, D), the encoder's.

    recent: (M, 2, D), embeddings of the last tokens. path: (M, P, 2, H, D), keys and values of the nodes above and of
    this one that are not in the cache.
    """

    hidden: Tensor
    output: Tensor
    recent: Tensor
    path: Tensor


class ChimeraNetwork(DraftNetwork):
    """Trigram encoder, full-context encoder, and an output layer for each depth."""

    def __init__(self, target: TargetFacts, vocabulary: DraftVocabulary, depth: int) -> None:
        super().__init__()
        size = target.hidden_size
        self.vocabulary, self.max_depth = vocabulary, depth
        self.trigram = nn.Sequential(IdentityBlock(_GRAM * size), nn.Linear(_GRAM * size, size, bias=False))
        self.encoder = DecoderLayer(target)
        self.outputs = nn.ModuleList(nn.Linear(2 * size, len(vocabulary), bias=False) for _ in range(depth))

    def logits(self, hidden: Tensor, output: Tensor, depth: int) -> Tensor:
        """(…, R) of the target's last states and of the encoder's outputs of a depth, (…, D) both."""
        logits: Tensor = self.outputs[depth - 1](torch.cat([hidden, output], -1))
        return logits

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, and keys and values, of states or trigrams; see `Attention.project`."""
        return self.encoder.attention.project(self.encoder.attention_norm(x), positions)

    def encode(self, trigrams: Tensor, attended: Tensor) -> Tensor:
        """The encoder's outputs (…, D) of trigrams (…, D) and of what they attended to, (…, heads * D)."""
        return self.encoder.finish(trigrams, self.encoder.attention.out(attended))

    def begin(self) -> _Sequence:
        """No token yet."""
        return _Sequence()

    def state_bytes(self, tokens: int) -> int:
        """See DraftNetwork: two keys and values for each token, and embeddings of the last ones."""
        (embedding,) = self._embedding
        recent = (_GRAM - 1) * embedding.shape[1] * self.dtype.itemsize
        return super().state_bytes(2 * tokens + self.max_depth) + recent

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Add states and trigrams to the caches, and encode the last trigram of each sequence."""
        counts = [len(new) for new in tokens]
        device = features[0].device
        grams, starts = [], []
        for state, new in zip(states, tokens, strict=True):
            embedded = self.embed(new)
            before = embedded.new_zeros(_GRAM - 1, embedded.shape[1]) if state.recent is None else state.recent
            embedded = torch.cat([before, embedded])
            grams.append(torch.cat([embedded[:-2], embedded[1:-1], embedded[2:]], -1))
            # A copy, because a view would keep the embeddings of the whole prompt.
            state.recent = embedded[1 - _GRAM :].clone()
            starts.append(state.length)
        trigrams, hidden = self.trigram(torch.cat(grams)), torch.cat(list(features))
        positions = torch.cat(
            [torch.arange(start, start + count, device=device) for start, count in zip(starts, counts, strict=True)]
        )
        _, of_states = self.project(hidden, positions)
        queries, of_trigrams = self.project(trigrams, positions + 1)
        for state, *both in zip(states, of_states.split(counts), of_trigrams.split(counts), strict=True):
            state.cache.append(torch.cat(both))
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        sequence = torch.arange(len(counts), device=device)
        path = of_trigrams[last, None][:, :0]
        caches, rows = [state.cache for state in states], range(len(states))
        attended = self.encoder.attention.attend_path(caches, rows, queries[last], path)
        output = self.encode(trigrams[last], attended)
        nodes = _Nodes(hidden[last], output, torch.stack([state.recent for state in states]), path)
        return Frontier(self.logits(nodes.hidden, output, 1), sequence, 1, nodes)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """The parents' outputs as states of the target, and the trigrams that end with the tokens."""
        above, depth, sequence = frontier.carried, frontier.depth + 1, frontier.sequence[rows]
        grams = torch.cat([above.recent[rows], self.embed(tokens)[:, None]], 1)
        trigrams = self.trigram(grams.flatten(1))
        owners = sequence.tolist()
        positions = torch.tensor([states[row].length + frontier.depth for row in owners], device=trigrams.device)
        _, of_states = self.project(above.output[rows], positions - 1)
        queries, of_trigrams = self.project(trigrams, positions)
        path = torch.cat([above.path[rows], of_states[:, None], of_trigrams[:, None]], 1)
        caches = [state.cache for state in states]
        attended = self.encoder.attention.attend_path(caches, owners, queries, path)
        nodes = _Nodes(above.hidden[rows], self.encode(trigrams, attended), grams[:, 1:], path)
        return Frontier(self.logits(nodes.hidden, nodes.output, depth), sequence, depth, nodes)

    def unroll(self, batch: HeadBatch) -> Iterator[Tensor]:
        """The encoder's outputs of each depth d, (B, T - 1 - d, D), along the text."""
        count = batch.tokens.shape[1] - 2
        positions = batch.positions[:, :count]
        trigrams = self.trigram(self._grams(batch, count))
        _, of_states = self.project(batch.features[:, :count].to(self.dtype), positions)
        queries, of_trigrams = self.project(trigrams, positions + 1)
        mask = block_causal(batch.segments[:, :count])
        own: list[Tensor] = []
        output = trigrams  # of no depth yet
        for depth in range(1, self.max_depth + 1):
            count = batch.tokens.shape[1] - 1 - depth
            ahead = slice(depth - 1, depth - 1 + count)
            if depth > 1:
                _, of_outputs = self.project(output[:, :count], positions[:, :count] + depth - 1)
                own = [*(before[:, :count] for before in own), of_outputs, of_trigrams[:, ahead]]
            context = torch.cat([of_states[:, :count], of_trigrams[:, :count]], 1)
            seen = mask[..., :count, :count].repeat(1, 1, 1, 2)
            output = self.encode(trigrams[:, ahead], attend_unrolled(queries[:, ahead], context, own, seen))
            yield output

    def _grams(self, batch: HeadBatch, count: int) -> Tensor:
        """Embeddings (B, count, 3 * D) of the three tokens up to t + 1, next to each other; zeros if there are less."""
        embedded, positions = self.embed(batch.tokens[:, 1 : 1 + count]), batch.positions[:, :count]
        parts = []
        for back in reversed(range(_GRAM)):
            shifted = nn.functional.pad(embedded, (0, 0, back, 0))[:, :count]
            # At position p, the token before the text's second one is no part of what `read` is given.
            parts.append(shifted * (positions >= back)[..., None])
        return torch.cat(parts, -1)


@dataclass(frozen=True)
class Chimera(DraftHead):
    """Head with `depth` drafts.

    decay: weight of a depth's loss relative to that of the one before. alignment: weight of the mean square distance of
    the encoder's output from the target's own state at the drafted token.
    """

    depth: int = 4
    decay: float = 1.0
    alignment: float = 1.0
    drafter: ClassVar[str] = "chimera"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
            ("alignment", self.alignment >= 0, "0 or more"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """The state that the target's output layer reads."""
        return (FINAL,)

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> ChimeraNetwork:
        """The network, with random weights."""
        return ChimeraNetwork(target, vocabulary, self.depth)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Both halves of the output layers begin as the target's rows of the draft's vocabulary."""
        assert isinstance(network, ChimeraNetwork)
        rows = weights.output[network.vocabulary.ids]
        for output in network.outputs:
            assert isinstance(output, nn.Linear)
            output.weight.data.copy_(torch.cat([rows, rows], 1))

    def training_passes(self, window: int) -> float:
        """The encoder runs for every depth."""
        return float(self.depth)

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Logits of every depth along the text."""
        assert isinstance(network, ChimeraNetwork)
        return [
            network.logits(batch.features[:, : output.shape[1]], output, depth)
            for depth, output in enumerate(network.unroll(batch), 1)
        ]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy and the distance of the states."""
        assert isinstance(network, ChimeraNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        for depth, output in enumerate(network.unroll(batch), 1):
            targets = batch.at_depth(depth)
            valid, count = targets.valid, targets.valid.shape[1]
            hidden, output = batch.features[:, :count][valid].to(output), output[valid]
            total.add(depth, network.logits(hidden, output, depth), targets)
            following = batch.features[:, depth : depth + count][valid]
            distance = (output.float() - following.float()).square().sum()
            total.add_loss(depth, self.alignment * mean(distance, output.numel()))
        return total.loss()
