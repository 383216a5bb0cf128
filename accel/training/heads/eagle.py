"""EAGLE-3-style head: one decoder layer that goes on from its own outputs, trained as it is used.

Source: Li et al. 2025, arXiv:2503.01840 (EAGLE-3), and its code, github.com/SafeAILab/EAGLE.
Departs from it: the loss is the cross-entropy with the target's most probable ids as far as they were recorded, where
the code's is that with its whole distribution; targets of less than seven layers give other layers than the second, the
middle one and the third from last. As in the code, the tokens of all steps are the text's.

The hidden states of a low, a middle and a high layer of the target are fused to one vector of its width. The layer
attends from the norms of the token's embedding and of this vector, next to each other. Its output makes the logits, and
takes the place of the fused vector of the next token, whose hidden states do not exist yet. Training repeats these
steps: in step s a token attends to the context as the target sees it, and to its own s outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError, check_fields
from hasten.accel.training.heads.attention import Attention, KeyValueCache, SwiGLU, block_causal
from hasten.accel.training.heads.draft_head import (
    DepthTargets,
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss

FEATURES = 3
# From this number of layers on, the layers are the paper's.
_DEEP = 7


@dataclass(frozen=True)
class Step:
    """said: (…, D), of which the logits are made. carried: (…, D), which the next step reads."""

    said: Tensor
    carried: Tensor


class EagleNetwork(DraftNetwork):
    """The layer with its fusion and output. normed_residual: whether its residual is its normed input."""

    def __init__(
        self, target: TargetFacts, vocabulary: DraftVocabulary, depth: int, normed_residual: bool = False
    ) -> None:
        super().__init__()
        size, eps = target.hidden_size, target.rms_norm_eps
        self.vocabulary, self.max_depth, self._normed_residual = vocabulary, depth, normed_residual
        self.fuse = nn.Linear(FEATURES * size, size, bias=False)
        self.embedding_norm, self.hidden_norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.attention = Attention(target, 2 * size)
        self.mlp_norm = nn.RMSNorm(size, eps)
        self.mlp = SwiGLU(target)
        self.norm = nn.RMSNorm(size, eps)
        self.output = nn.Linear(size, len(vocabulary), bias=False)

    def logits(self, said: Tensor) -> Tensor:
        """(…, R) of states (…, D)."""
        logits: Tensor = self.output(self.norm(said))
        return logits

    def enter(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Input (…, 2 * D) of the attention, and the residual (…, D)."""
        normed = self.hidden_norm(hidden)
        residual = normed if self._normed_residual else hidden
        return torch.cat([self.embedding_norm(embedded), normed], -1), residual

    def leave(self, residual: Tensor, attended: Tensor) -> Step:
        """What follows the attention, (…, D) both."""
        x = residual + attended
        x = x + self.mlp(self.mlp_norm(x))
        return Step(x, x)

    def begin(self) -> KeyValueCache:
        """An empty cache."""
        return KeyValueCache()

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """The layer over all new tokens; behind its attention, only the last of each sequence goes on."""
        counts = [len(new) for new in tokens]
        one = len(counts) == 1
        hidden = self.fuse(features[0] if one else torch.cat(list(features)))
        x, residual = self.enter(self.embed(tokens[0] if one else torch.cat(list(tokens))), hidden)
        attended = self.attention.extend(states, x, counts)
        residual = residual[-1:] if one else torch.stack([part[-1] for part in residual.split(counts)])
        step = self.leave(residual, attended)
        sequence = torch.arange(len(counts), device=residual.device)
        return Frontier(self.logits(step.said), sequence, 1, (step.carried, None))

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """The layer from its own outputs; a node attends to its sequence's context and to its path."""
        hidden, path = frontier.carried
        sequence = frontier.sequence[rows]
        x, residual = self.enter(self.embed(tokens), hidden[rows])
        attended, path = self.attention.extend_path(states, sequence, x, None if path is None else path[rows])
        step = self.leave(residual, attended)
        return Frontier(self.logits(step.said), sequence, frontier.depth + 1, (step.carried, path))

    def unroll(self, batch: HeadBatch, rows: Tensor | None = None) -> Iterator[Step]:
        """The steps of training, depth by depth, of N rows of each window.

        rows: (B, N) int64 in ascending order, the positions t to draft at; None takes all T - 2. At depth d only
        the rows below T - 1 - d have a token to go on from; what the others give is of no use.
        """
        last = batch.tokens.shape[1] - 1
        x, residual = self.enter(
            self.embed(batch.tokens[:, 1:last]), self.fuse(batch.features[:, : last - 1].to(self.dtype))
        )
        queries, context = self.attention.project(x, batch.positions[:, : last - 1])
        mask = block_causal(batch.segments[:, : last - 1])
        if rows is None:
            rows = torch.arange(last - 1, device=x.device).expand(len(x), -1)
        else:
            # Only the keys and values of other rows are read.
            of_window = torch.arange(len(x), device=x.device)[:, None]
            queries, residual, mask = (
                queries[of_window, rows],
                residual[of_window, rows],
                mask[of_window, 0, rows][:, None],
            )
        positions = batch.positions.gather(1, rows)
        own: list[Tensor] = []
        for depth in range(1, self.max_depth + 1):
            if depth > 1:
                x, residual = self.enter(self.embed(batch.tokens.gather(1, (rows + depth).clamp(max=last))), residual)
                queries, new = self.attention.project(x, positions + depth - 1)
                own.append(new)
            step = self.leave(residual, self.attention.out(attend_unrolled(queries, context, own, mask)))
            residual = step.carried
            yield step


def learned_rows(batch: HeadBatch, max_depth: int) -> tuple[Tensor, Tensor]:
    """Rows (B, N) int64 of each window at which a draft of any depth has to predict something, in ascending order.

    Windows with fewer rows than others have further ones at their end, marked False in the second result, (B, N) bool.
    """
    windows, length = batch.tokens.shape
    needed = torch.zeros(windows, length - 2, dtype=torch.bool, device=batch.tokens.device)
    for depth in range(1, max_depth + 1):
        valid = batch.at_depth(depth).valid
        needed[:, : valid.shape[1]] |= valid
    counts = needed.sum(1, keepdim=True)
    count = max(1, int(counts.max()))
    rows = needed.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return rows, torch.arange(count, device=rows.device) < counts


def attend_unrolled(queries: Tensor, context: Tensor, own: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attention (B, T, heads * D) to the context up to each token, and to the token's own S steps.

    queries: (B, T, heads, D). context: keys and values (B, C, 2, H, D). own: those of S steps, (B, T, 2, H, D) each.
    mask: (B, 1, T, C) bool or larger, see `block_causal`. Scores of a token's own steps are products of rows, which
    stand behind the C columns of the context; there is no mask of a step.
    """
    batch, count, _, size = queries.shape
    columns, kv_heads, steps = context.shape[1], context.shape[3], len(own)
    queries = (queries * size**-0.5).unflatten(2, (kv_heads, -1))  # (B, T, H, G, D)
    keys, values = context.permute(2, 0, 3, 1, 4)  # (B, H, C, D) each
    if steps:
        keys, values = (nn.functional.pad(each, (0, 0, 0, steps)) for each in (keys, values))
    folded = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, H, G * T, D)
    scores = (folded @ keys.mT).view(batch, kv_heads, -1, count, columns + steps)
    # In place: a copy of the scores for each step is most of the memory.
    scores[..., :columns].masked_fill_(~mask[:, :, None, :count, :columns], -torch.inf)
    if steps:
        near = torch.stack(list(own), 2)  # (B, T, S, 2, H, D)
        scores[..., columns:] = torch.einsum("bthgd,btshd->bhgts", queries, near[:, :, :, 0])
    probs = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    attended = (probs.flatten(2, 3) @ values).view(batch, kv_heads, -1, count, size)
    if steps:
        attended = attended + torch.einsum("bhgts,btshd->bhgtd", probs[..., columns:], near[:, :, :, 1])
    return attended.permute(0, 3, 1, 2, 4).flatten(2)


@dataclass(frozen=True)
class Eagle(DraftHead):
    """Head of one decoder layer, trained over ttt_steps steps, which is also its largest depth.

    decay: weight of a step's loss relative to that of the one before. feature_layers: hidden states that it reads, as
    numbers of decoder layers passed, low to high; () takes the second, the middle one and the third from last.
    intermediate_size: width of its feed-forward layer; 0 takes the target's. normed_residual: whether the layer's
    residual begins after the norm of its input.
    """

    ttt_steps: int = 5
    decay: float = 0.8
    feature_layers: tuple[int, ...] = ()
    intermediate_size: int = 0
    normed_residual: bool = False
    drafter: ClassVar[str] = "eagle"

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))  # JSON and YAML have lists
        check_fields(
            self,
            ("ttt_steps", self.ttt_steps >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
            ("feature_layers", len(self.feature_layers) in (0, FEATURES), f"{FEATURES} numbers of layers, or none"),
            ("intermediate_size", self.intermediate_size >= 0, "0 (the target's) or more"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """A low, a middle and a high layer; they differ if the target has four layers or more."""
        last = target.layers
        if not self.feature_layers:
            return (2, last // 2, last - 3) if last >= _DEEP else (min(1, last - 1), last // 2, last - 1)
        if not all(-1 <= layer < last for layer in self.feature_layers):
            raise UserError(
                f"feature_layers={list(self.feature_layers)} is wrong: the target has {last} layers, so expected "
                f"numbers from 0 (its embedding) to {last - 1}, or -1 (after its final norm)"
            )
        return self.feature_layers

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> EagleNetwork:
        """The network, with random weights."""
        return EagleNetwork(self.sizes(target), vocabulary, self.ttt_steps, self.normed_residual)

    def sizes(self, target: TargetFacts) -> TargetFacts:
        """Sizes of the layer: the target's, except for its own intermediate_size."""
        return replace(target, intermediate_size=self.intermediate_size or target.intermediate_size)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """The output layer begins as the target's rows of the draft's vocabulary."""
        assert isinstance(network, EagleNetwork)
        network.output.weight.data.copy_(weights.output[network.vocabulary.ids])

    def training_passes(self, window: int) -> float:
        """Every step passes all tokens."""
        return float(self.ttt_steps)

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Logits of every step of training."""
        assert isinstance(network, EagleNetwork)
        count = batch.tokens.shape[1] - 1
        return [network.logits(step.said[:, : count - depth]) for depth, step in enumerate(network.unroll(batch), 1)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over steps of decay^step times the cross-entropy."""
        assert isinstance(network, EagleNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        rows, counted = learned_rows(batch, network.max_depth)
        for depth, step in enumerate(network.unroll(batch, rows), 1):
            targets = batch.at_depth(depth)
            last = targets.valid.shape[1] - 1
            valid = targets.valid.gather(1, rows.clamp(max=last)) & (rows <= last) & counted
            predicting = Step(step.said[valid], step.carried[valid])
            total.add(depth, network.logits(predicting.said), targets)
            self.add_losses(total, network, batch, targets, depth, predicting)
        return total.loss()

    def add_losses(
        self,
        total: DepthLoss,
        network: EagleNetwork,
        batch: HeadBatch,
        targets: DepthTargets,
        depth: int,
        step: Step,
    ) -> None:
        """Further losses of a step; none here. step: of the N rows whose targets are valid, (N, D), in order."""
        return
