"""A draft model distilled from the target: a small Llama with the target's tokenizer, trained on what the target says.

Source: Leviathan et al. 2023, arXiv:2211.17192, and Zhou et al. 2023, arXiv:2310.08461 (DistillSpec), which compares
divergences for distillation; Ren et al. 2023, arXiv:2310.04691 (EMO) has the earth mover loss.
Departs from DistillSpec: the target's recorded most probable ids stand for its distribution, and the text is the
target's own, never the draft's.
It reads no hidden states, so that the same records train it for any target of the tokenizer. What is saved is an
ordinary checkpoint, which every drafter with a draft model loads.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.errors import UserError, check_fields
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.copied_files import copied_files
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.heads.draft_head import (
    CONFIG,
    WEIGHTS,
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.stored import BFLOAT16
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss, Objective
from hasten.accel.training.objectives.earth_mover import EarthMover
from hasten.accel.training.objectives.reverse_kl import reverse_kl
from hasten.accel.training.objectives.soft_cross_entropy import soft_cross_entropy

OBJECTIVES = ("forward_kl", "reverse_kl", "emo")
_MODEL_CONFIG = "config.json"
# Entries of a config that belong to the tokenizer.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class DraftModelNetwork(DraftNetwork):
    """A Llama with all ids of the target. source: folder of the target, whose tokenizer is saved with the model."""

    def __init__(self, model: LlamaForCausalLM, depth: int) -> None:
        super().__init__()
        self.model, self.max_depth = model, depth
        self.vocabulary = DraftVocabulary.full(model.config.vocab_size)
        self.source: Path | None = None
        self._directions: tuple[EarthMover] | None = None

    def states(self, batch: HeadBatch, exits: Sequence[int] = ()) -> list[Tensor]:
        """Normed states (B, T, D) after these numbers of layers, each as the last one; () gives those after all.

        A token attends to tokens of its own document only.
        """
        count = batch.tokens.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=batch.tokens.device).tril()
        # Padding attends to itself, because a softmax over no keys is nan.
        mask = causal & (batch.segments[:, :, None] == batch.segments[:, None])
        inner = self.model.model
        out = inner(
            input_ids=batch.tokens,
            attention_mask=mask[:, None],
            position_ids=batch.positions,
            use_cache=False,
            output_hidden_states=bool(exits),
        )
        if not exits:
            return [out.last_hidden_state]
        # transformers' own list has the embedding at 0, and the state after the final norm at the end.
        last = len(inner.layers)
        return [out.last_hidden_state if exit == last else inner.norm(out.hidden_states[exit]) for exit in exits]

    def earth_mover(self) -> EarthMover:
        """The objective with the target's embedding, made once."""
        (embedding,) = self._embedding
        if self._directions is None or self._directions[0].directions.device != embedding.device:
            self._directions = (EarthMover.of(embedding),)
        return self._directions[0]

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """A draft model drafts from tokens, the first one included."""
        raise NotImplementedError("a draft model drafts as drafter=draft_model")

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """A draft model drafts from tokens, the first one included."""
        raise NotImplementedError("a draft model drafts as drafter=draft_model")


@dataclass(frozen=True)
class DistilledDraft(DraftHead):
    """A Llama with `num_layers` decoder layers.

    share: of the target's hidden size, rounded to whole attention heads, and of its feed-forward size. hidden_size: in
    place of share; 0 takes share. objective: forward_kl, reverse_kl or emo. tied: whether embedding and output layer
    are one. from_embedding: whether they begin as the target's, projected to its principal components where the draft
    is narrower. from_layers: layers of the target that the first ones begin as, for a draft of the target's width.
    depth: tokens of a chain, of which acceptance is measured.
    """

    num_layers: int = 2
    share: float = 0.5
    hidden_size: int = 0
    objective: str = "forward_kl"
    tied: bool = True
    from_embedding: bool = True
    from_layers: tuple[int, ...] = ()
    depth: int = 5
    drafter: ClassVar[str] = "draft_model"
    reads_target: ClassVar[bool] = False
    stores: ClassVar[tuple[str, ...]] = (BFLOAT16,)  # a checkpoint's

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_layers", tuple(self.from_layers))
        check_fields(
            self,
            ("num_layers", self.num_layers >= 1, "1 or more"),
            ("share", 0 < self.share <= 1, "above 0 and at most 1"),
            ("hidden_size", self.hidden_size >= 0, "0 (take share) or a number of channels"),
            ("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
            ("from_layers", len(self.from_layers) <= self.num_layers, f"at most num_layers={self.num_layers} numbers"),
            ("depth", self.depth >= 1, "1 or more"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """None: the draft model reads tokens."""
        return ()

    def config(self, target: TargetFacts) -> LlamaConfig:
        """Config of the draft model for a target; UserError for a size that does not fit."""
        size = self.hidden_size or max(1, round(self.share * target.hidden_size / target.head_dim)) * target.head_dim
        heads, kv_heads = target.heads, target.kv_heads
        if size > target.hidden_size or size % target.head_dim:
            raise UserError(
                f"hidden_size={size} is wrong: expected a multiple of the target's head size {target.head_dim}, at "
                f"most its hidden size {target.hidden_size}"
            )
        if size < target.hidden_size:
            heads = size // target.head_dim
            most = max(1, round(target.kv_heads * heads / target.heads))
            kv_heads = next(count for count in range(most, 0, -1) if heads % count == 0)
        inner = target.intermediate_size * size // target.hidden_size
        return LlamaConfig(
            vocab_size=target.vocabulary,
            hidden_size=size,
            intermediate_size=max(64, inner - inner % 64) if size < target.hidden_size else inner,
            num_hidden_layers=self.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=target.head_dim,
            max_position_embeddings=target.max_length,
            rms_norm_eps=target.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": target.rope_theta},
            tie_word_embeddings=self.tied,
        )

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> DraftModelNetwork:
        """An untrained Llama with all ids of the target, whatever the vocabulary: a checkpoint has its tokenizer's."""
        return DraftModelNetwork(LlamaForCausalLM(self.config(target)), self.depth)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Embedding, output layer and chosen layers of the target; UserError for layers that are not a Llama's."""
        assert isinstance(network, DraftModelNetwork)
        network.source = weights.folder
        model = network.model
        if self.from_embedding:
            axes = _principal_axes(weights.embedding, model.config.hidden_size)
            model.model.embed_tokens.weight.data.copy_(weights.embedding @ axes)
            if not self.tied:
                model.lm_head.weight.data.copy_(weights.output @ axes)
        if self.from_layers:
            self._copy_layers(model, weights)

    def _copy_layers(self, model: LlamaForCausalLM, weights: TargetWeights) -> None:
        given = f"from_layers={list(self.from_layers)}"
        if weights.folder is None:
            raise UserError(f"{given} needs the target's checkpoint")
        if model.config.hidden_size != weights.embedding.shape[1]:
            raise UserError(
                f"{given} needs a draft of the target's width: its hidden size is {weights.embedding.shape[1]}, and "
                f"the draft's {model.config.hidden_size}; give share=1"
            )
        checkpoint = Checkpoint(weights.folder)
        for number, source in enumerate(self.from_layers):
            prefix = f"model.layers.{source}."
            theirs = {name.removeprefix(prefix) for name in checkpoint.names if name.startswith(prefix)}
            layer = model.model.layers[number]
            own = dict(layer.named_parameters())
            if not theirs:
                raise UserError(f"{given}: the target has no layer {source}; they are counted from 0")
            if theirs != set(own):
                differing = ", ".join(sorted(theirs ^ set(own)))
                raise UserError(f"{given}: layer {source} of the target is not a Llama's, they differ in {differing}")
            for name, parameter in own.items():
                parameter.data.copy_(checkpoint.tensor(prefix + name, torch.float32))
        model.model.norm.weight.data.copy_(checkpoint.tensor("model.norm.weight", torch.float32))

    def objective_of(self, network: DraftModelNetwork) -> Objective:
        """The objective's function."""
        if self.objective == "emo":
            return network.earth_mover()
        return reverse_kl if self.objective == "reverse_kl" else soft_cross_entropy

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """The objective at every token that is to be learned."""
        assert isinstance(network, DraftModelNetwork)
        [states] = network.states(batch)
        return self.loss_of(network, states, batch)

    def loss_of(self, network: DraftModelNetwork, states: Tensor, batch: HeadBatch) -> Loss:
        """The loss of states (B, T, D) before the output layer."""
        targets = batch.at_depth(0)
        total = DepthLoss(network.vocabulary, objective=self.objective_of(network))
        # Rows that do not count are left out before the output layer, which is most of the work.
        total.add(1, network.model.lm_head(states[:, :-1][targets.valid]), targets)
        return total.loss()

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """The model's logits, which at every depth are those after the text."""
        assert isinstance(network, DraftModelNetwork)
        [states] = network.states(batch)
        logits = network.model.lm_head(states)
        return [logits[:, depth:-1] for depth in range(1, self.depth + 1)]

    def drafter_memory(self, network: DraftNetwork) -> SmallModel:
        """The model as a draft model."""
        assert isinstance(network, DraftModelNetwork)
        return SmallModel(FastTarget.of(network.model))

    def save(
        self,
        network: DraftNetwork,
        folder: Path,
        target: TargetFacts,
        extra: Mapping[str, Any],
        store: str = BFLOAT16,
    ) -> None:
        """Write a checkpoint in bfloat16 with the target's tokenizer, and the head's config beside it."""
        assert isinstance(network, DraftModelNetwork)
        assert store == BFLOAT16, store
        folder.mkdir(parents=True, exist_ok=True)
        model = network.model
        names = {name for name, _ in model.named_parameters()}  # of tied weights the first one only
        tensors = {
            name: value.detach().cpu().bfloat16().contiguous()
            for name, value in model.state_dict().items()
            if name in names
        }
        write_whole(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
        tokens = {}
        if network.source is not None:
            for file in copied_files(network.source):
                shutil.copyfile(file, folder / file.name)
            theirs = json.loads((network.source / _MODEL_CONFIG).read_text())
            tokens = {name: theirs[name] for name in _TOKENS if name in theirs}
        about = {"head": self.drafter, "hyper_parameters": asdict(self), "target": asdict(target), **extra}
        config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16", **tokens}
        for name, content in ((CONFIG, about), (_MODEL_CONFIG, config)):
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            write_whole(folder / name, partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def _principal_axes(embedding: Tensor, size: int) -> Tensor:
    """The `size` directions (D, size) in which embeddings (V, D) vary most; the identity for size D."""
    if size == embedding.shape[1]:
        return torch.eye(size)
    values, vectors = torch.linalg.eigh((embedding.mT @ embedding).double())
    return vectors[:, values.argsort(descending=True)[:size]].float()
