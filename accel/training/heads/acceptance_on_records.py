"""SpecDec++'s acceptance head as a draft head, so that the trainer trains it on the target's records.

Source: Huang et al. 2024, arXiv:2405.19715 (SpecDec++); see `acceptance_training`, which runs the target instead.
Departs from that training: of an id that is not among the target's recorded ones, the probability is an equal share of
what these leave; the draft model runs in every step, because every step mixes other draws into the text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.loading_needs import register_loader
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.accel.training.heads.acceptance_training import AcceptanceTraining
from hasten.accel.training.heads.draft_head import (
    CONFIG,
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
)
from hasten.accel.training.heads.stored import BFLOAT16
from hasten.accel.training.heads.vocabulary import DraftVocabulary

_DRAFTS_NOTHING = "an acceptance head drafts nothing: it ends the chains of drafter=specdec_pp"


class AcceptanceNetwork(DraftNetwork):
    """The head, and the frozen draft model outside of its state."""

    def __init__(self, head: AcceptanceHead, draft: PreTrainedModel) -> None:
        super().__init__()
        self.head, self.max_depth = head, 0
        self.vocabulary = DraftVocabulary.full(draft.config.vocab_size)
        self._draft = (draft.eval().requires_grad_(False),)

    def draft(self, tokens: Tensor, batch: HeadBatch) -> Any:
        """The draft model's pass over tokens (B, T) in place of the batch's; each sees its own document only."""
        (draft,) = self._draft
        count = tokens.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        mask = causal & (batch.segments[:, :, None] == batch.segments[:, None])
        draft.to(tokens.device)
        with torch.no_grad():
            return draft(
                input_ids=tokens,
                attention_mask=mask[:, None],
                position_ids=batch.positions,
                use_cache=False,
                output_hidden_states=True,
            )

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """It drafts nothing."""
        raise NotImplementedError(_DRAFTS_NOTHING)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """It drafts nothing."""
        raise NotImplementedError(_DRAFTS_NOTHING)


@dataclass(frozen=True)
class AcceptanceOnRecords(DraftHead):
    """The acceptance head of a draft model. training: its hyper-parameters. draft: folder of the draft model."""

    training: AcceptanceTraining
    draft: str
    drafter: ClassVar[str] = AcceptanceTraining.drafter
    reads_target: ClassVar[bool] = False
    stores: ClassVar[tuple[str, ...]] = (BFLOAT16,)

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """None: it reads the draft model's states."""
        return ()

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> AcceptanceNetwork:
        """A head with random weights, and the draft model, whose rows may be more than the target's."""
        register_loader(Path(self.draft))
        draft = AutoModelForCausalLM.from_pretrained(self.draft, dtype=torch.float32)
        return AcceptanceNetwork(AcceptanceHead(draft.config.hidden_size, self.training.blocks), draft)

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """The weighted cross-entropy of the acceptance of drawn tokens; the draws are torch's global ones."""
        assert isinstance(network, AcceptanceNetwork)
        hidden, labels = self.examples(network, batch)
        logits = network.head(hidden)
        loss = self.training.loss(logits, labels)
        with torch.no_grad():
            predicted = self.training.unweighted(logits.float().softmax(-1)[:, 1])
            error = (predicted - labels).abs().sum() / max(1, len(labels))
            accepted = labels.sum() / max(1, len(labels))
        return Loss(loss, {"accepted": accepted, "error": error})

    @torch.no_grad()
    def examples(self, network: AcceptanceNetwork, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """States (N, D) of drawn tokens, and their acceptance (N,) by the target."""
        own, targets = batch.tokens, batch.at_depth(0)
        probs = network.draft(own, batch).logits[:, :-1].float().softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1).view(len(own), -1, 1)
        draft_probs = probs.gather(-1, drawn)[..., 0]
        top_probs = targets.top_log_probs.float().exp()  # (B, T - 1, K)
        said = targets.top_ids == drawn
        others = network.vocabulary.size - top_probs.shape[-1]
        rest = (1 - top_probs.sum(-1)).clamp(min=0) / max(1, others)
        target_probs = torch.where(said.any(-1), (top_probs * said).sum(-1), rest)
        drawn = drawn[..., 0]
        stays = torch.rand(drawn.shape, device=own.device) < self.training.mixing
        # A document begins with its own token.
        stays |= batch.segments[:, 1:] != batch.segments[:, :-1]
        mixed = torch.cat([own[:, :1], torch.where(stays, own[:, 1:], drawn)], 1)
        states = network.draft(mixed, batch).hidden_states[-1][:, 1:]
        counted = ~stays & targets.valid
        return states[counted], (target_probs / draft_probs).clamp(max=1)[counted]

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Nothing is drafted."""
        return []

    def save(
        self,
        network: DraftNetwork,
        folder: Path,
        target: TargetFacts,
        extra: Mapping[str, Any],
        store: str = BFLOAT16,
    ) -> None:
        """Write the head's file, as `hasten train_drafter` does, and a config beside it."""
        assert isinstance(network, AcceptanceNetwork)
        assert store == BFLOAT16, store
        folder.mkdir(parents=True, exist_ok=True)
        network.head.save(folder / FILE, Checkpoint(Path(self.draft)).fingerprint())
        hyper_parameters = asdict(self.training)
        about = {"head": self.drafter, "hyper_parameters": hyper_parameters, "target": asdict(target), **extra}
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        write_whole(folder / CONFIG, lambda temporary: Path(temporary).write_text(text))
