"""Orthogonal rotations of a model that leave its outputs as they are, folded into the weights of its checkpoint.

Source: Ashkboos et al. 2024, arXiv:2404.00456, section 3 (R1 and R2 as Liu et al. 2024, arXiv:2405.16406, call them).
RMS norms without weights commute with a rotation of the residual stream: so the weights of norms move into the layers
behind them, layers that read the stream are multiplied by R1 on their input side, and layers that write it on their
output side. The values of each attention head are rotated by R2, which the output projection undoes. Inputs of down
projections may be rotated while the model runs (R4, see activations/hadamard.py), which their weights undo.
Departs from it: the Hadamard matrix across heads, which also needs a rotation while the model runs, is left out, and so
is that of queries and keys (R3): vLLM does not apply it, and would read scales of keys that it does not have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.activations.hadamard import InputHadamard, hadamard_of
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint_view import CheckpointView
from hasten.accel.models.experts import DOWN

# Layers of a block, by the norm that they read the residual stream through; routers of experts among them.
READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "post_attention_layernorm": ("gate_proj", "up_proj", "gate_up_proj", "gate", "router", "shared_expert_gate"),
}
# Layers that write to the residual stream.
WRITERS = ("o_proj", "down_proj")
# Layers and norms within attention, which neither read nor write the residual stream.
_INNER = ("q_norm", "k_norm", "q_b_proj", "kv_b_proj", "q_a_layernorm", "kv_a_layernorm")
# Norms of what a layer writes: their weights scale channels between the layer and the residual stream.
_OUTPUT_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")
# Tokens, and largest relative change of a block's output, of check_rotation. A checkpoint's 16 bits cost half a per
# cent, a block that is not rotated as a whole changes entirely.
_TOKENS, _TOLERANCE = 16, 0.05

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices, float64; a row vector x becomes x R.

    residual: R1 (D, D), None for none. heads: R2 (head size, head size) of each block, or () for none. online: whether
    inputs of down projections are rotated while the model runs.
    """

    residual: Tensor | None
    heads: tuple[Tensor, ...] = ()
    online: bool = False


@dataclass(frozen=True)
class RotationGradient:
    """Gradients of the mean divergence on some tokens, times the number of tokens; by R1 (D, D) and R2 of each block.

    divergence: its sum, in nats.
    """

    tokens: int
    divergence: float
    residual: Tensor
    heads: tuple[Tensor, ...]

    def __add__(self, other: "RotationGradient") -> "RotationGradient":
        return RotationGradient(
            self.tokens + other.tokens,
            self.divergence + other.divergence,
            self.residual + other.residual,
            tuple(one + two for one, two in zip(self.heads, other.heads, strict=True)),
        )


@dataclass(frozen=True)
class StreamRoles:
    """Paths in a block, without `.weight`, of the norm of each layer that reads the residual stream, and of writers."""

    readers: dict[str, str]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class HeadRoles:
    """Paths in a block, without `.weight`.

    values: the rows of layers that make the values of attention heads. outputs: layers that read these values.
    """

    values: dict[str, slice]
    outputs: tuple[str, ...]


def head_size(architecture: Architecture) -> int:
    """Number of values of an attention head."""
    config: Any = architecture.config
    return int(getattr(config, "head_dim", None) or architecture.hidden_size // config.num_attention_heads)


def check_norms(architecture: Architecture) -> None:
    """UserError where the norms of a model do not commute with R1."""
    _, norm = architecture.last_norm()
    states = torch.randn(4, architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states.to(architecture.device, architecture.dtype)
    if getattr(norm, "bias", None) is not None or torch.allclose(norm(states + 1), norm(states), atol=1e-2):
        raise _refused(architecture, "their norms are LayerNorms, which subtract the mean of the channels")
    adapter = architecture.adapter
    others = [path for path in (*adapter.front, *adapter.tables, *adapter.tail[1:]) if path != adapter.embedding]
    if others:
        raise _refused(architecture, f"{others[0]} reads or writes the residual stream outside the blocks")


def stream_roles(architecture: Architecture, index: int) -> StreamRoles:
    """Layers of a block that R1 is folded into; UserError names what prevents it."""
    leaves = _leaves(architecture, index)
    norms = {leaf: norm for norm, readers in READERS.items() for leaf in readers}
    blocked = [path for path, leaf in leaves.items() if leaf in _OUTPUT_NORMS]
    if blocked:
        raise _refused(
            architecture,
            f"{blocked[0]} scales the channels of a layer's output before it is added to the residual stream, and no "
            "layer can absorb these factors",
        )
    known = {*norms, *READERS, *WRITERS, *_INNER}
    unknown = [path for path, leaf in leaves.items() if leaf not in known]
    missing = [norm for leaf, norm in norms.items() if leaf in leaves.values() and norm not in leaves.values()]
    if unknown or missing:
        what = f"{unknown[0]} is unknown" if unknown else f"there is no {missing[0]}"
        raise _refused(architecture, f"in block {index} {what}")
    return StreamRoles(
        {path: norms[leaf] for path, leaf in leaves.items() if leaf in norms},
        tuple(path for path, leaf in leaves.items() if leaf in WRITERS),
    )


def head_roles(architecture: Architecture, index: int) -> HeadRoles:
    """Layers of a block that R2 is folded into; none where the block has no values by head."""
    config: Any = architecture.config
    values: dict[str, slice] = {}
    leaves = _leaves(architecture, index)
    for path, leaf in leaves.items():
        if leaf == "v_proj":
            values[path] = slice(0, None)
        elif leaf == "qkv_proj":
            heads = config.num_attention_heads + config.num_key_value_heads
            values[path] = slice(heads * head_size(architecture), None)
    outputs = tuple(path for path, leaf in leaves.items() if leaf == "o_proj")
    return HeadRoles(values, outputs) if values and outputs else HeadRoles({}, ())


def online_rotations(architecture: Architecture) -> dict[str, InputHadamard]:
    """Rotations of the inputs of all down projections, by layer name; UserError names what prevents them."""
    rotations = {}
    for index in range(architecture.num_blocks):
        for layer in architecture.linears(index):
            if layer.expert is not None:
                reason = "servers run all experts of a layer as one, without rotations of their inputs"
                raise _refused(architecture, f"{reason}: give online=false")
            if layer.module.rpartition(".")[2] != DOWN:
                continue
            if architecture.checkpoint.input_rotation(layer.name) is not None:
                raise _refused(architecture, f"inputs of {layer.name} are rotated already: give online=false")
            rotations[layer.name] = hadamard_of(layer.columns)
            if rotations[layer.name].size == 1:
                raise _refused(
                    architecture, f"{layer.name} has {layer.columns} inputs, an odd number: give online=false"
                )
    if not rotations:
        raise _refused(architecture, f"there is no {DOWN} whose inputs could be: give online=false")
    return rotations


def _leaves(architecture: Architecture, index: int) -> dict[str, str]:
    """Last part of the path of every module of a block that has a weight, by the path."""
    paths = (path.rpartition(".") for path in architecture.block_parameters(index))
    return {path: path.rpartition(".")[2] for path, _, leaf in sorted(paths) if leaf == "weight"}


def _refused(architecture: Architecture, reason: str) -> UserError:
    model_type = architecture.checkpoint.config.get("model_type")
    return UserError(f"{model_type} models cannot be rotated: {reason}")


def by_head(weight: Tensor, rotation: Tensor) -> Tensor:
    """weight (R, heads * size) times the rotation (size, size) of every head."""
    return (weight.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


class RotatedCheckpoint(CheckpointView):
    """A checkpoint whose tensors are rotated while they are read, in their stored dtype.

    Norms get the weights with which they scale nothing. The output matrix is a tensor of its own, because the last
    norm is folded into it alone: a pair that was tied takes twice the space.
    architecture: of the original. rotation: called when a tensor is read. stream: whether it has a matrix R1. online:
    see Rotation.
    """

    def __init__(
        self, architecture: Architecture, rotation: Callable[[], Rotation], stream: bool = True, online: bool = False
    ) -> None:
        super().__init__(architecture.checkpoint)
        self.config = dict(self.source.config)
        self._architecture, self._rotation = architecture, rotation
        self._online = online_rotations(architecture) if online else {}
        # Tensors that are read from another one.
        self._origins: dict[str, str] = {}
        if stream:
            check_norms(architecture)
            for index in range(architecture.num_blocks):
                stream_roles(architecture, index)
            self._embedding, self._head = architecture.embedding_name(), architecture.head_name()
            if self._embedding == self._head:
                # Tied tensors may be stored under either name.
                norm, _ = architecture.last_norm()
                leaf = architecture.adapter.embedding.rpartition(".")[2]
                self._embedding = f"{norm.removesuffix(norm.rpartition('.')[2])}{leaf}.weight"
                self._head = "lm_head.weight"
                self._origins[self._head] = self._origins[self._embedding] = architecture.head_name()
                self.config["tie_word_embeddings"] = False

    @cached_property
    def _changes(self) -> dict[str, list[Change]]:
        """What becomes of a tensor; of matrices outside the blocks, of any of their rows."""
        rotation, changes = self._rotation(), dict[str, list[Change]]()
        if rotation.residual is not None:
            self._rotate_stream(changes, rotation.residual.float())
        for index, matrix in enumerate(rotation.heads):
            self._rotate_heads(changes, index, matrix.float())
        for layer, online in self._online.items():
            _add(changes, f"{layer}.weight", online)
        return changes

    def _rotate_stream(self, changes: dict[str, list[Change]], matrix: Tensor) -> None:
        architecture = self._architecture
        name, norm = architecture.last_norm()
        neutral = neutral_weight(norm)
        # Norms alone are folded where nothing is rotated.
        turns = not torch.equal(matrix, torch.eye(len(matrix)))
        columns: list[Change] = [partial(torch.matmul, other=matrix)] if turns else []
        rows: list[Change] = [partial(torch.matmul, matrix.T)] if turns else []
        _add(changes, self._embedding, *columns)
        _add(changes, self._head, self._absorbed(f"{name}.weight", neutral), *columns)
        _add(changes, f"{name}.weight", partial(torch.full_like, fill_value=neutral))
        for index in range(architecture.num_blocks):
            names, roles = architecture.block_parameters(index), stream_roles(architecture, index)
            for path, of_norm in roles.readers.items():
                factors = self._absorbed(names[f"{of_norm}.weight"], neutral)
                _add(changes, names[f"{path}.weight"], factors, *columns)
            for of_norm in dict.fromkeys(roles.readers.values()):
                _add(changes, names[f"{of_norm}.weight"], partial(torch.full_like, fill_value=neutral))
            for path in roles.writers:
                _add(changes, names[f"{path}.weight"], *rows)
                if f"{path}.bias" in names:
                    _add(changes, names[f"{path}.bias"], *columns)

    def _rotate_heads(self, changes: dict[str, list[Change]], index: int, matrix: Tensor) -> None:
        architecture = self._architecture
        names, roles = architecture.block_parameters(index), head_roles(architecture, index)
        for path, rows in roles.values.items():

            def weight(tensor: Tensor, rows: slice = rows) -> Tensor:
                return torch.cat([tensor[: rows.start], by_head(tensor[rows].T, matrix).T])

            def bias(tensor: Tensor, rows: slice = rows) -> Tensor:
                return torch.cat([tensor[: rows.start], by_head(tensor[rows], matrix)])

            _add(changes, names[f"{path}.weight"], weight)
            if f"{path}.bias" in names:
                _add(changes, names[f"{path}.bias"], bias)
        for path in roles.outputs:
            _add(changes, names[f"{path}.weight"], partial(by_head, rotation=matrix))

    def _absorbed(self, norm: str, neutral: float) -> Change:
        """The change that multiplies columns by the factors of a norm."""
        return lambda weight: weight * (self.source.tensor(norm, torch.float32) + (1 - neutral))

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._changes:
            return tensor
        changed = tensor.float()
        for change in self._changes[name]:
            changed = change(changed)
        return changed.to(tensor.dtype).contiguous()

    def _origin(self, name: str) -> str:
        return self._origins.get(name, name)

    @property
    def names(self) -> list[str]:
        """Logical names, sorted."""
        return sorted({*self.source.names, *self._origins})

    def __contains__(self, name: str) -> bool:
        return name in self._origins or name in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        return self.source.shape(self._origin(name))

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self.source.dtype(self._origin(name))

    def stored_bytes(self, name: str) -> int:
        """See Checkpoint."""
        return self.source.stored_bytes(self._origin(name))

    def is_packed(self, name: str) -> bool:
        """False: rotated weights are plain."""
        return False

    def is_quantized(self, name: str) -> bool:
        """False: rotated weights are plain."""
        return False

    def quantization(self, name: str) -> None:
        """None: rotated weights are plain."""

    def input_rotation(self, layer: str) -> InputHadamard | None:
        """See Checkpoint."""
        return self._online.get(layer) or self.source.input_rotation(layer)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A rotated tensor; dtype None is the stored dtype."""
        tensor = self._changed(name, self.source.tensor(self._origin(name)))
        return tensor if dtype is None else tensor.to(dtype)

    def has_rows(self, name: str) -> bool:
        """See Checkpoint."""
        return self.source.has_rows(self._origin(name))

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a matrix outside the blocks by index (N,), as [N, columns]."""
        return self._changed(name, self.source.rows(self._origin(name), index))

    def check(self, name: str) -> None:
        """UserError where the original's tensor holds NaN or infinite values."""
        self.source.check(self._origin(name))


def _add(changes: dict[str, list[Change]], name: str, *added: Change) -> None:
    changes.setdefault(name, []).extend(added)


def neutral_weight(norm: nn.Module) -> float:
    """Weight with which a norm scales nothing: 1, or 0 where the factor is 1 + weight, as in Gemma."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    stored = weight.data
    weight.data = torch.zeros_like(stored)
    output = norm(torch.ones_like(stored))
    weight.data = stored
    return 0.0 if bool(output.any()) else 1.0


def check_rotation(
    architecture: Architecture, rotated: Architecture, matrix: Tensor | None, blocks: Iterable[int]
) -> None:
    """UserError where a block of the rotated model does not compute what the original's does. matrix: R1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, _TOKENS, architecture.hidden_size, generator=generator, dtype=torch.float32)
    for index in blocks:
        outputs = []
        for model, given in ((architecture, states), (rotated, states if matrix is None else states @ matrix.float())):
            given = given.to(model.device, model.dtype)
            outputs.append((model.run_block(model.load_block(index), index, given) - given).float().cpu())
        expected = outputs[0] if matrix is None else outputs[0] @ matrix.float()
        # The median, because a token of a mixture may be routed to other experts.
        error = float(((outputs[1] - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
        if not error < _TOLERANCE:
            raise _refused(architecture, f"the output of block {index} changes by {error:.0%}")
