"""Base of heads whose drafts come from the target's own pass, out of virtual tokens that they put into it.

The target is frozen. Training runs a window once without gradient, which fills a KV cache; the virtual tokens behind
some of its positions then run over that cache, and the gradient goes through them alone.
Position i of m at token t drafts token t + 1 + i, so it has the depth i of `HeadBatch.at_depth`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.families import refusal
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.targets.virtual import VirtualTokens
from hasten.accel.models.loading_needs import register_loader
from hasten.accel.training.division import rand
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

_DRAFTS_IN_A_PASS = "it drafts in the target's own pass"


class FrozenTarget:
    """A model that is not trained, in float32, and the same as a target to decode with, made when it is asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._target: Target | None = None

    @classmethod
    def of(cls, folder: Path) -> "FrozenTarget":
        """The model of a checkpoint."""
        register_loader(folder)
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"))

    @property
    def target(self) -> Target:
        """The target."""
        if self._target is None:
            fast = refusal(self.model.config) is None
            self._target = FastTarget.of(self.model) if fast else TransformersTarget(self.model)
        return self._target


@dataclass(frozen=True)
class WindowContext:
    """What virtual tokens see of a batch of windows of T tokens. cache: of the windows, which are its first T entries.

    hidden: states (B, T, D) of the windows after each number of layers, where a network asked for them.
    """

    batch: HeadBatch
    cache: DynamicCache
    hidden: dict[int, Tensor]

    def mask(self, anchors: Tensor, seen: Tensor) -> Tensor:
        """(B, 1, N * S, T + N * S) bool: what S virtual tokens of each of N anchors (B, N) attend to.

        A token sees the tokens of its own document up to its anchor, and those of its anchor's that `seen` (S, S) says.
        """
        segments = self.batch.segments
        tokens = torch.arange(segments.shape[1], device=segments.device)
        own = segments.gather(1, anchors)
        # Padding is an anchor, too, where a window has few tokens: it sees itself, as a softmax over no keys is nan.
        text = (tokens <= anchors[..., None]) & (segments[:, None] == own[..., None])  # (B, N, T)
        count, size = anchors.shape[1], len(seen)
        text = text.repeat_interleave(size, 1)
        virtual = torch.block_diag(*[seen.to(segments.device)] * count).bool().expand(len(anchors), -1, -1)
        return torch.cat([text, virtual], -1)[:, None]

    def positions(self, anchors: Tensor, depths: Tensor) -> Tensor:
        """Positions (B, N * S) of S virtual tokens of these depths (S,) behind every anchor (B, N)."""
        return (self.batch.positions.gather(1, anchors)[..., None] + depths.to(anchors.device)).flatten(1)


class VirtualNetwork(DraftNetwork):
    """A network of m positions with e virtual tokens each, whose logits are averaged; token (i, g) is number i * e + g.

    A virtual token sees those of its own number g at earlier positions (the ensemble mask).
    """

    def __init__(self, vocabulary: int, positions: int, ensemble: int) -> None:
        super().__init__()
        self.vocabulary = DraftVocabulary.full(vocabulary)
        self.max_depth, self.ensemble = positions, ensemble
        self._frozen: tuple[FrozenTarget] | None = None

    @abstractmethod
    def virtual(self) -> VirtualTokens:
        """The virtual tokens, as the target's passes take them."""

    @abstractmethod
    def states(self, context: WindowContext, anchors: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Normed states (B, N * m * e, D) of the virtual tokens behind the anchors (B, N), in the order of numbers."""

    def hidden_layers(self) -> Sequence[int]:
        """Numbers of layers after which `states` reads hidden states of the windows."""
        return ()

    def attach(self, embedding: Tensor) -> None:
        """Give the target's embedding; its model moves to the same device."""
        super().attach(embedding)
        if self._frozen is not None:
            self.frozen.model.to(embedding.device)

    def freeze(self, frozen: FrozenTarget) -> None:
        """Give the target; a tuple hides it from the module's parameters."""
        self._frozen = (frozen,)

    def borrow(self, other: DraftNetwork) -> None:
        """Use the target of another network."""
        assert isinstance(other, VirtualNetwork)
        self._frozen = other._frozen

    @property
    def frozen(self) -> FrozenTarget:
        """The target's model."""
        assert self._frozen is not None, "freeze gives the target"
        return self._frozen[0]

    def target(self) -> Target:
        """The target, in which it drafts."""
        return self.frozen.target

    def logits(self, batch: HeadBatch, anchors: Tensor) -> Tensor:
        """Logits (B, N, m, V) of the drafts at tokens `anchors` (B, N) of windows."""
        context = self._context(batch)
        numbers = torch.arange(self.max_depth * self.ensemble)
        depth, group = numbers // self.ensemble, numbers % self.ensemble
        seen = (group[:, None] == group) & (depth[:, None] >= depth)
        states = self.states(context, anchors, context.mask(anchors, seen), context.positions(anchors, depth + 1))
        logits = self.frozen.model.get_output_embeddings()(states)
        # The mean of logits is that of log probabilities up to a constant.
        return logits.view(*anchors.shape, self.max_depth, self.ensemble, -1).mean(-2)

    @torch.no_grad()
    def _context(self, batch: HeadBatch) -> WindowContext:
        model = self.frozen.model
        count, wanted = batch.tokens.shape[1], self.hidden_layers()
        causal = torch.ones(count, count, dtype=torch.bool, device=batch.tokens.device).tril()
        mask = causal & (batch.segments[:, :, None] == batch.segments[:, None])
        cache = DynamicCache()
        out = model.get_decoder()(
            input_ids=batch.tokens,
            attention_mask=mask[:, None],
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(wanted),
        )
        return WindowContext(batch, cache, {layer: out.hidden_states[layer] for layer in wanted})

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """It drafts in the target's own pass."""
        raise NotImplementedError(_DRAFTS_IN_A_PASS)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """It drafts in the target's own pass."""
        raise NotImplementedError(_DRAFTS_IN_A_PASS)


@dataclass(frozen=True)
class VirtualHead(DraftHead):
    """A head of virtual tokens. anchors: tokens of a window, drawn at random, behind which a step trains them.

    decay: weight of a depth's loss relative to that of the one before.
    """

    anchors: int = 64
    decay: float = 0.8
    reads_target: ClassVar[bool] = False

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """None: it computes the target's states itself."""
        return ()

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Load the target."""
        assert isinstance(network, VirtualNetwork)
        assert weights.folder is not None, "the target's checkpoint"
        network.freeze(FrozenTarget.of(weights.folder))

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy with the target's recorded distribution."""
        assert isinstance(network, VirtualNetwork)
        usable = batch.at_depth(1).valid.float()
        rows, columns = usable.shape
        count = min(self.anchors, columns)
        # Tokens that count first, in random order; others fill up windows that have few of them.
        anchors = (usable + rand(rows, columns, usable.device)).topk(count, -1).indices
        logits = network.logits(batch, anchors)
        total = DepthLoss(network.vocabulary, self.decay)
        for depth in range(1, network.max_depth + 1):
            targets = _at(batch.at_depth(depth), anchors)
            total.add(depth, logits[:, :, depth - 1][targets.valid], targets)
        return total.loss()

    def target_passes(self, network: DraftNetwork, window: int) -> float:
        """One over the window, and one with its gradient, which is twice the work more, over the virtual tokens."""
        assert isinstance(network, VirtualNetwork)
        return 1 + 3 * min(self.anchors, window) * network.max_depth * network.ensemble / window

    @torch.no_grad()
    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """The drafts at every token."""
        assert isinstance(network, VirtualNetwork)
        count = batch.tokens.shape[1]
        parts = torch.arange(count - 1, device=batch.tokens.device).split(max(1, self.anchors))
        logits = torch.cat([network.logits(batch, part.expand(len(batch.tokens), -1)) for part in parts], 1)
        return [logits[:, : count - 1 - depth, depth - 1] for depth in range(1, network.max_depth + 1)]


def _at(targets: DepthTargets, anchors: Tensor) -> DepthTargets:
    """The targets of tokens `anchors` (B, N) only; those behind the last row are not valid."""
    last = targets.valid.shape[1] - 1
    index = anchors.clamp(max=last)
    tops = index[..., None].expand(-1, -1, targets.top_ids.shape[-1])
    return DepthTargets(
        targets.labels.gather(1, index),
        targets.top_ids.gather(1, tops),
        targets.top_log_probs.gather(1, tops),
        targets.valid.gather(1, index) & (anchors <= last),
    )
