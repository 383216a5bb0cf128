"""The interface of draft heads: trained modules that draft from the target's hidden states.

A `DraftHead` is a frozen dataclass of hyper-parameters; it builds a `DraftNetwork`, defines its training loss, and
writes its folder. The drafter of the same name (accel/decoding/drafters/heads) grows trees with the network. To add a
head, write a module here, a drafter, and a file in conf/head and in conf/drafter.

Positions. Let h(t) be the features of token t (`Target.feature_layers`), from which the target predicts token t + 1. At
h(t), with token t + 1 known, the draft of depth d = 1, 2, … is of token t + 1 + d.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.virtual import VirtualTokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.heads.stored import BFLOAT16, INT8, from_stored, to_stored
from hasten.accel.training.heads.vocabulary import DraftVocabulary

CONFIG, WEIGHTS = "head.json", "model.safetensors"
# Names of the modules of a network whose rows are those of the draft's vocabulary.
OUTPUTS = ("output", "outputs")


@dataclass(frozen=True)
class TargetFacts:
    """What a head must know of its target. fingerprint: of its checkpoint."""

    vocabulary: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_length: int
    fingerprint: str = ""

    @classmethod
    def of(cls, folder: Path) -> "TargetFacts":
        """Facts of a checkpoint."""
        return replace(cls.of_config(folder), fingerprint=Checkpoint(folder).fingerprint())

    @classmethod
    def of_config(cls, folder: Path) -> "TargetFacts":
        """The same without the fingerprint, for which the weights are read; a config.json is enough."""
        config = AutoConfig.from_pretrained(folder).get_text_config()
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return cls(
            vocabulary=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
            rope_theta=float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
            max_length=config.max_position_embeddings,
        )


@dataclass(frozen=True)
class TargetWeights:
    """Weights of the target that heads begin with. embedding, output: (V, D) float32.

    folder: of the checkpoint, for heads that begin with more of it; None for weights without one.
    """

    embedding: Tensor
    output: Tensor
    folder: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> "TargetWeights":
        """Embedding and output layer of a checkpoint; one tensor where they are tied."""
        checkpoint = Checkpoint(folder)
        embedding = next((name for name in checkpoint.names if name.endswith("embed_tokens.weight")), None)
        if embedding is None:
            raise UserError(f"{folder} has no tensor embed_tokens.weight: a head for it cannot be trained")
        output = next((name for name in checkpoint.names if name.endswith("lm_head.weight")), embedding)
        weight = checkpoint.tensor(embedding, torch.float32)
        return cls(weight, weight if output == embedding else checkpoint.tensor(output, torch.float32), folder)


@dataclass(frozen=True)
class HeadBatch:
    """Windows of B sequences of T tokens with what the target made of them; tensors on the training device.

    tokens: (B, T) int64. features: (B, T, F * D). top_ids (B, T, K) int64, top_log_probs (B, T, K): the target's most
    probable ids after each token, with log probabilities among all ids. learned: (B, T) bool, whether the loss counts
    this token as one to be predicted, such as those of answers. segments: (B, T) int64, number of the document that a
    token is of, -1 for padding; tokens of one document are adjacent. positions: (B, T) int64 within the document.
    """

    tokens: Tensor
    features: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    learned: Tensor
    segments: Tensor
    positions: Tensor

    def to(self, device: torch.device | str) -> "HeadBatch":
        """The batch on a device."""
        return HeadBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def next_tokens(self) -> Tensor:
        """(B, T) int64, token t + 1 at t; the last one of a window is repeated, and is never counted."""
        return torch.cat([self.tokens[:, 1:], self.tokens[:, -1:]], 1)

    def at_depth(self, depth: int) -> "DepthTargets":
        """What a draft of this depth, 1 or more, has to predict at each t, as rows of T' = T - 1 - depth positions."""
        count = self.tokens.shape[1] - 1 - depth
        same = self.segments[:, :count] == self.segments[:, 1 + depth :]
        return DepthTargets(
            self.tokens[:, 1 + depth :],
            self.top_ids[:, depth : depth + count],
            self.top_log_probs[:, depth : depth + count],
            same & (self.segments[:, :count] >= 0) & self.learned[:, 1 + depth :],
        )


@dataclass(frozen=True)
class DepthTargets:
    """labels (B, T'): the text's own token. top_ids, top_log_probs (B, T', K): the target's. valid (B, T') bool."""

    labels: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Loss:
    """value: scalar to minimise. parts: named scalars without gradient for the log, such as `accuracy_1` by depth."""

    value: Tensor
    parts: Mapping[str, Tensor]


@dataclass
class Frontier:
    """M nodes of draft trees after which a network has drafted.

    logits: (M, R) over the draft's vocabulary, of the nodes' children. sequence: (M,) int64, row of each node's
    sequence among those of the call. depth: of the children. carried: what the network needs to go on; only it knows.
    """

    logits: Tensor
    sequence: Tensor
    depth: int
    carried: Any


class CachingModule(nn.Module, ABC):
    """A part of a network with a cache in each sequence's state."""

    @abstractmethod
    def cache_values(self, tokens: int) -> int:
        """Numbers, at most, that the cache has room for once it has grown to `tokens` tokens."""


class DraftNetwork(nn.Module, ABC):
    """A head's network. It has no copy of the target's embedding: `attach` gives it, (V, D), outside of its state.

    max_depth: largest depth of a draft. vocabulary: the ids of its outputs. dtype: of its arithmetic.
    """

    max_depth: int
    vocabulary: DraftVocabulary
    dtype: torch.dtype = torch.float32

    def attach(self, embedding: Tensor) -> None:
        """Give the target's embedding; a tuple hides it from the module's parameters."""
        self._embedding = (embedding,)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (…, D) of the target's ids (…), in the dtype of the network."""
        (embedding,) = self._embedding
        return embedding[tokens].to(self.dtype)

    def borrow(self, other: "DraftNetwork") -> None:
        """Take over what another network of the same head holds outside of its state, such as a frozen target."""
        return

    def target(self) -> Target | None:
        """The target that the network drafts in, with which it is measured; None for one that is replayed."""
        return None

    def virtual(self) -> VirtualTokens | None:
        """The virtual tokens that it puts into the target's passes; None for none."""
        return None

    def begin(self) -> Any:
        """State of a sequence that has no token yet; None for a network that keeps none."""
        return None

    def state_bytes(self, tokens: int) -> int:
        """Bytes, at most, of the caches of a sequence of up to `tokens` tokens."""
        values = sum(module.cache_values(tokens + self.max_depth) for module in self._caching())
        return values * self.dtype.itemsize

    def _caching(self) -> list[CachingModule]:
        return [module for module in self.modules() if isinstance(module, CachingModule)]

    @abstractmethod
    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Read new committed tokens of B sequences and draft after the last one of each.

        features: (N, F * D) each, N >= 1 differing, of the tokens that are new since the last call. tokens: (N,), the
        id that follows each of them; the last one is the sequence's last committed token. States are updated in place.
        The result has B nodes, in order.
        """

    @abstractmethod
    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """Draft after children of the frontier's nodes. rows: (M,) index of each child's parent. tokens: (M,) ids."""


class ParallelNetwork(DraftNetwork):
    """A network whose `read` drafts all depths at once, the same below every node, whatever was drafted above."""

    def all_depths(self, logits: Tensor) -> Frontier:
        """The result of `read` for logits (B, max_depth, R)."""
        return Frontier(logits[:, 0], torch.arange(len(logits), device=logits.device), 1, logits)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """Drafts of the next depth; tokens are not read."""
        sequence = frontier.sequence[rows]
        return Frontier(frontier.carried[:, frontier.depth][sequence], sequence, frontier.depth + 1, frontier.carried)


class DraftHead(ABC):
    """A head's hyper-parameters and its training; a frozen dataclass.

    drafter: name in conf/drafter of the drafter that uses it. reads_target: whether its network drafts from the
    target's hidden states, by `read` and `step`; if not, it trains something else on the target's records, such as a
    draft model or virtual tokens of the target's own passes (virtual.py), and `save` writes what that drafter loads.
    stores: how its weights can be stored, see `to_stored`.
    """

    drafter: ClassVar[str]
    reads_target: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = (BFLOAT16, INT8)

    @abstractmethod
    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """Hidden states of the target that it reads, as numbers of `Target.feature_layers`."""

    @abstractmethod
    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> DraftNetwork:
        """An untrained network in float32; random numbers are torch's global ones."""

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Copy what the network begins with from the target, such as rows of its output layer; nothing by default."""
        return

    @abstractmethod
    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """The training loss of a batch, as a mean over predicted tokens."""

    @abstractmethod
    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Logits (B, T - 1 - d, R) of each depth d = 1, 2, … up to the network's, if the text is drafted.

        Row t is what `read` of the tokens up to t, and `step` along tokens t + 2, … give: what is trained must be what
        is used. Only rows whose tokens are of one document count.
        """

    def training_passes(self, window: int) -> float:
        """How often a token of a window passes the network's parameters in training, for estimates of its cost."""
        return 1.0

    def target_passes(self, network: DraftNetwork, window: int) -> float:
        """How often a token of a window passes the target in training, beyond its record; forward passes."""
        return 0.0

    def drafter_memory(self, network: DraftNetwork) -> Any:
        """Memory of the drafter of this head with the network as it is, to measure it by replay while it is trained.

        None for a head whose drafter is a `HeadDrafter`, whose memory is made of the network, and for one that drafts
        nothing.
        """
        return None

    def save(
        self,
        network: DraftNetwork,
        folder: Path,
        target: TargetFacts,
        extra: Mapping[str, Any],
        store: str = BFLOAT16,
    ) -> None:
        """Write the folder atomically by file, config last.

        extra: further keys for the config, such as `rates`. store: see `to_stored`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_stored(network.state_dict(), store)
        tensors["d2t"] = network.vocabulary.d2t.cpu()
        write_whole(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary))
        config = {
            "head": self.drafter,
            "hyper_parameters": asdict(self),  # type: ignore[call-overload]
            "target": asdict(target),
            **extra,
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_whole(folder / CONFIG, lambda temporary: Path(temporary).write_text(text))


def load_head(
    folder: Path, head_type: type[DraftHead], target: TargetFacts | None = None
) -> tuple[DraftHead, DraftNetwork, dict[str, Any]]:
    """Head, network in float32 and config of a folder; UserError if it holds no head, or one for another target.

    head_type: the head that is expected. target: facts of the target that it will be used with.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        facts = TargetFacts(**config["target"])
        d2t = tensors.pop("d2t")
        vocabulary = DraftVocabulary(d2t + torch.arange(len(d2t)), facts.vocabulary)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"head={folder} is no folder of a trained head: train one with hasten train") from error
    if target is not None:
        check_target(folder, facts, target)
    # Before the hyper-parameters, which another head does not have.
    if config["head"] != head_type.drafter:
        raise UserError(f"head={folder} is a head of {config['head']}: expected one of {head_type.drafter}")
    head = head_type(**config["hyper_parameters"])
    network = head.build(facts, vocabulary)
    try:
        network.load_state_dict(from_stored(tensors))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"head={folder} is damaged: its tensors are not those of {config['head']}: {error}") from error
    return head, network.eval(), config


def adopt_weights(network: DraftNetwork, other: DraftNetwork) -> None:
    """Copy the weights of another network of the same head, whose draft vocabulary may differ.

    Rows of output layers (modules `output` or `outputs`) whose ids the other lacks stay as they are. ValueError names a
    tensor of another shape.
    """
    rows = other.vocabulary.rows_of(network.vocabulary.ids)
    held, own = rows >= 0, network.state_dict()
    for name, tensor in other.state_dict().items():
        is_output = name.split(".")[0] in OUTPUTS
        expected = (len(rows), *tensor.shape[1:]) if is_output else tensor.shape
        if name not in own or own[name].shape != expected:
            raise ValueError(f"{name} of shape {list(tensor.shape)} is no tensor of the network to train")
        if is_output:
            own[name][held] = tensor[rows[held]].to(own[name])
        else:
            own[name].copy_(tensor)


def check_target(folder: Path, trained: TargetFacts, target: TargetFacts) -> None:
    """UserError that says what differs, unless a head was trained for this target."""
    own, other = asdict(trained), asdict(target)
    differing = [name for name in own if own[name] != other[name] and name != "fingerprint"]
    if differing:
        texts = ", ".join(f"{name} {own[name]} against {other[name]}" for name in differing)
        raise UserError(f"head={folder} was trained for another target: {texts}; train one with hasten train")
    if trained.fingerprint and target.fingerprint and trained.fingerprint != target.fingerprint:
        raise UserError(
            f"head={folder} was trained for another target: its weights have the fingerprint "
            f"{trained.fingerprint[:12]}, and the target's {target.fingerprint[:12]}; train one with hasten train"
        )
