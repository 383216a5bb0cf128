"""The model of a checkpoint, described and run block by block.

Blocks are transformers' own modules, called with transformers' own rotary embeddings and masks. A call reads the
weights of one block at most.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.experts import Experts, expert_sizes, is_fused
from hasten.accel.models.families import family_of
from hasten.accel.models.forwards import Forward
from hasten.accel.models.output_layer import OutputLayer
from hasten.accel.models.scale_sites import ScaleSite, scale_sites
from hasten.accel.models.skeleton import build_skeleton

_EXPERTS = "mlp.experts"
# Roles of the matrices outside the blocks: output layer, embedding, or one tensor that serves as both.
HEAD, EMBEDDING, TIED = "head", "embedding", "tied"


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    name: its name in the checkpoint, without `.weight`. module: its path in the block that `load_block` returns.
    group: equal for layers that read the same input. expert: number of the expert, None outside a mixture of experts.
    """

    name: str
    module: str
    rows: int
    columns: int
    group: str
    expert: int | None = None


class Architecture:
    """The model of a checkpoint; weights and hidden states have this dtype and lie on this device.

    Raises UserError where the model family is not supported, or where a tensor is missing or has a wrong shape.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self._family = family_of(checkpoint.config.get("model_type"))
        self._skeleton = build_skeleton(checkpoint, dtype)
        self.config = self._skeleton.config
        self.num_blocks = len(self._skeleton.blocks)
        self.hidden_size = int(self.config.hidden_size)
        self._prefix = self._find_prefix()
        self._arguments: dict[int, list[dict[str, object]]] = {}
        self._output_layer: OutputLayer | None = None
        self._front_is_loaded = False
        self._names = self._sort_names()
        self._check_tensors()

    def embed(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] that enter the first block, for tokens [B, T]; reads only these tokens' rows.

        table: embedding (V, D) in place of the checkpoint's.
        """
        self._check_length(tokens.shape[1])
        self._load_front()
        decoder = self._skeleton.decoder
        unique, positions = tokens.cpu().unique(return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < self.config.vocab_size:
            wrong = int(unique[0]) if int(unique[0]) < 0 else int(unique[-1])
            raise UserError(f"token {wrong} is outside the model's vocabulary of {self.config.vocab_size}")
        name = self.embedding_name()
        rows = self.checkpoint.rows(name, unique) if table is None else table[unique.to(table.device)]
        self.checkpoint.check_finite(rows, name)
        module = decoder.embed_tokens
        # The model's own module, which may scale, with a table of only the rows in use. So padding_idx, which counts
        # rows of the whole table, must not apply.
        module.padding_idx = None
        module.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        with torch.no_grad():
            hidden = module(positions.to(self.device))
            module.weight = nn.Parameter(hidden.new_empty(0, device="meta"), requires_grad=False)
            if getattr(decoder, "project_in", None) is not None:
                hidden = decoder.project_in(hidden)
            if hasattr(decoder, "embed_positions"):
                hidden = hidden + decoder.embed_positions(torch.ones_like(tokens[:1], device=self.device))
        return hidden

    def block_arguments(self, length: int) -> list[dict[str, object]]:
        """Keyword arguments of each block's forward for sequences of this length, at batch size 1."""
        if length not in self._arguments:
            self._check_length(length)
            self._load_front()
            decoder = self._skeleton.decoder
            width = getattr(self.config, "word_embed_proj_dim", self.hidden_size)
            inputs = torch.zeros(1, length, width, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                decoder(inputs_embeds=inputs, use_cache=False)
            # Masks are quadratic in the length, and few lengths occur: only the last length's are kept.
            self._arguments = {length: [recorder.take() for recorder in decoder.layers]}
        return self._arguments[length]

    def load_block(self, index: int) -> nn.Module:
        """Block with its weights, experts unfused to linear layers; UserError names a tensor that is not finite."""
        block = self._empty_block(index)
        self._fill_block(block, index)
        return block.eval()

    def run_block(self, block: nn.Module, index: int, hidden: Tensor, differentiable: bool = False) -> Tensor:
        """Output [B, T, D] of block `index` for hidden [B, T, D]; differentiable: with its graph for autograd."""
        arguments = self.block_arguments(hidden.shape[1])[index]
        with torch.set_grad_enabled(differentiable):
            output = block(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def run_forwards(self, block: nn.Module, forwards: Sequence[Forward]) -> None:
        """Run forwards, each of which calls `run_block` of this block, from their start to their end.

        One after another, or layer by layer where the block is divided over processes.
        """
        for forward in forwards:
            forward.switch()
        self.supply(block, forwards)

    def supply(self, block: nn.Module, forwards: Sequence[Forward]) -> None:
        """Let forwards go on that wait for weights of a block; here all weights are in the block."""

    def replace_weights(self, block: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights of a block. weights: paths of layers in the block, and their weights [rows, columns]."""
        for path, weight in weights:
            parameter = block.get_submodule(path).weight
            assert isinstance(parameter, nn.Parameter)
            parameter.data = weight.to(parameter.device, parameter.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V], float32, of the last block's output [B, T, D]; for large vocabularies see output_layer."""
        layer = self.output_layer()
        inputs = layer.inputs(hidden)
        logits = torch.empty(*hidden.shape[:-1], layer.vocabulary, device=self.device)
        for first, tile in layer.tiles(inputs.flatten(0, -2)):
            logits.view(-1, layer.vocabulary)[:, first : first + tile.shape[1]] = tile
        return logits

    def output_layer(self) -> OutputLayer:
        """The output layer, whose weights are held in their stored dtype until `close`."""
        if self._output_layer is None:
            self._output_layer = self.output_layer_of(self._stored_head())
        return self._output_layer

    def output_layer_of(self, weight: Tensor) -> OutputLayer:
        """An output layer with this matrix (V, D') on the device, in any dtype, in place of the checkpoint's."""
        return self._make_output_layer(lambda first, last: weight[first:last])

    def streamed_output_layer(self) -> OutputLayer:
        """An output layer whose weights are read from the checkpoint whenever they are used.

        A packed output matrix whose rows cannot be read alone is unpacked and held, by this layer alone.
        """
        name, checkpoint = self.head_name(), self.checkpoint
        if not checkpoint.has_rows(name):
            return self.output_layer_of(self._stored_head())

        def read(first: int, last: int) -> Tensor:
            rows = checkpoint.row_range(name, first, last)
            checkpoint.check_finite(rows, name)
            return rows.to(self.device)

        return self._make_output_layer(read)

    @property
    def _logit_cap(self) -> float | None:
        """Magnitude that logits approach but do not exceed; None where the model does not cap them."""
        return getattr(self.config, "final_logit_softcapping", None) if self._family.caps_logits else None

    def close(self) -> None:
        """Frees the output layer and the masks; a later call reads them again."""
        self._output_layer, self._arguments = None, {}

    def linears(self, index: int) -> list[Layer]:
        """Linear layers of a block in execution order; no tensor is read."""
        block, layers = self._skeleton.blocks[index], []
        for group in self._family.inputs:
            for path in group:
                module = _find(block, path)
                if isinstance(module, nn.Linear):
                    layers.append(self._layer(index, path, module.out_features, module.in_features, group[0]))
        if self._is_mixture(block):
            number, inner, width = expert_sizes(block.mlp.experts)
            for expert in range(number):
                path = f"{_EXPERTS}.{expert}"
                for projection, rows, columns in (
                    ("gate_proj", inner, width),
                    ("up_proj", inner, width),
                    ("down_proj", width, inner),
                ):
                    shared = f"{path}.down_proj" if projection == "down_proj" else f"{path}.gate_proj"
                    layers.append(self._layer(index, f"{path}.{projection}", rows, columns, shared, expert))
        return layers

    def scale_sites(self, index: int) -> list[ScaleSite]:
        """Where inputs of a block's layers can be scaled without changing the block; no tensor is read."""
        start = f"{self._prefix}layers.{index}."
        block, family = self._skeleton.blocks[index], self._family
        layers, config = self.linears(index), self.config
        return scale_sites(block, layers, family, config, lambda local: start + family.logical(local), self.checkpoint)

    def outer_layers(self) -> dict[str, Layer]:
        """Output layer and embedding by role, HEAD and EMBEDDING; a tensor that serves as both has the role TIED."""
        names = {HEAD: self.head_name(), EMBEDDING: self.embedding_name()}
        if names[HEAD] == names[EMBEDDING]:
            names = {TIED: names[HEAD]}
        layers = {}
        for role, tensor in names.items():
            name = tensor.removesuffix(".weight")
            rows, columns = self.checkpoint.shape(tensor)
            layers[role] = Layer(name, name.rpartition(".")[2], rows, columns, name)
        return layers

    def block_tensors(self, index: int) -> list[str]:
        """Logical names of the checkpoint's tensors in a block."""
        return list(self._names.get(index, []))

    def outer_tensors(self) -> list[str]:
        """Logical names of the checkpoint's tensors outside the blocks."""
        return list(self._names.get(None, []))

    def block_parameters(self, index: int) -> dict[str, str]:
        """Logical name of every parameter of a block, by its path in the block that `load_block` returns."""
        start = f"{self._prefix}layers.{index}."
        names = {f"{layer.module}.weight": f"{layer.name}.weight" for layer in self.linears(index)}
        for local, _ in self._skeleton.blocks[index].named_parameters():
            if not local.startswith(f"{_EXPERTS}."):
                names[local] = start + self._family.logical(local)
        return names

    def last_norm(self) -> tuple[str, nn.Module]:
        """Logical name of the norm behind the last block, and a copy of it with its weights."""
        name, norm = f"{self._prefix}{self._family.norm}", copy.deepcopy(self._skeleton.norm)
        self._fill(norm, f"{name}.")
        return name, norm

    def _layer(self, index: int, path: str, rows: int, columns: int, shared: str, expert: int | None = None) -> Layer:
        start = f"{self._prefix}layers.{index}."
        return Layer(start + self._family.logical(path), path, rows, columns, start + shared, expert)

    def _empty_block(self, index: int) -> Any:
        """Block on the meta device, with experts as linear layers."""
        original = self._skeleton.blocks[index]
        block: Any = copy.deepcopy(original, {id(self.config): self.config})
        if self._is_mixture(original):
            block.mlp.experts = Experts(block.mlp.experts)
        return block

    def _fill_block(self, block: nn.Module, index: int, without: Collection[str] = ()) -> None:
        """Read the parameters of a block, except those `without`."""
        self._fill(block, f"{self._prefix}layers.{index}.", without)

    def _is_mixture(self, block: nn.Module) -> bool:
        return is_fused(_find(block, _EXPERTS))

    def _find_prefix(self) -> str:
        for prefix in self._family.prefixes:
            if any(name.startswith(f"{prefix}layers.0.") for name in self.checkpoint.names):
                return prefix
        expected = f"{self._family.prefixes[0]}layers.0."
        raise UserError(f"tensors {expected}* are missing from {self.checkpoint.path}: its model_type has such blocks")

    def _sort_names(self) -> dict[int | None, list[str]]:
        pattern = re.compile(re.escape(self._prefix) + r"layers\.(\d+)\.")
        names: dict[int | None, list[str]] = {}
        for name in self.checkpoint.names:
            match = pattern.match(name)
            names.setdefault(int(match[1]) if match else None, []).append(name)
        return names

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Logical name and shape of every tensor that the model needs."""
        for index, block in enumerate(self._skeleton.blocks):
            start = f"{self._prefix}layers.{index}."
            for layer in self.linears(index):
                yield f"{layer.name}.weight", (layer.rows, layer.columns)
            linear = {f"{layer.module}.weight" for layer in self.linears(index)}
            for local, parameter in block.named_parameters():
                if local not in linear and not local.startswith(f"{_EXPERTS}."):
                    yield start + self._family.logical(local), tuple(parameter.shape)
        decoder = self._skeleton.decoder
        yield self.embedding_name(), tuple(decoder.embed_tokens.weight.shape)
        yield self.head_name(), tuple(self._skeleton.head.weight.shape)
        outer = [("", decoder), (f"{self._family.norm}.", self._skeleton.norm)]
        if self._skeleton.project_out is not None:
            outer.append(("project_out.", self._skeleton.project_out))
        for start, module in outer:
            for local, parameter in module.named_parameters():
                if not local.startswith("embed_tokens."):
                    yield f"{self._prefix}{start}{local}", tuple(parameter.shape)

    def _check_length(self, length: int) -> None:
        # Rotary embeddings exist for any position, learned ones do not.
        limit = self.config.max_position_embeddings
        if hasattr(self._skeleton.decoder, "embed_positions") and length > limit:
            raise UserError(f"sequence length {length} is too long for the model: it has learned {limit} positions")

    def _check_tensors(self) -> None:
        for name, shape in self._expected():
            stored = self.checkpoint.shape(name)
            if stored != shape:
                where = f"in {self.checkpoint.path} has shape {list(stored)}"
                raise UserError(f"tensor {name} {where}: the config needs {list(shape)}")

    def embedding_name(self) -> str:
        """Logical name of the tensor that the embedding is read from."""
        name = f"{self._prefix}embed_tokens.weight"
        # Tied tensors may be stored under either name.
        return self.head_name() if self._skeleton.tied and name not in self.checkpoint else name

    def head_name(self) -> str:
        """Logical name of the tensor that the output projection is read from."""
        for name in self._family.heads:
            if name in self.checkpoint:
                return name
        return f"{self._prefix}embed_tokens.weight" if self._skeleton.tied else self._family.heads[0]

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        self.checkpoint.check_finite(tensor, name)
        return tensor.to(self.device, self.dtype)

    def _fill(self, module: nn.Module, start: str, without: Collection[str] = ()) -> None:
        """Read every parameter of a module on the meta device, except those `without`.

        start: the module's prefix in the checkpoint.
        """
        for local, _ in list(module.named_parameters()):
            if local not in without:
                parent, _, leaf = local.rpartition(".")
                tensor = self._read(start + self._family.logical(local))
                setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))

    def _load_front(self) -> None:
        """Load what runs before the blocks, except the embedding: OPT's positions and projection, and the buffers."""
        if not self._front_is_loaded:
            decoder = self._skeleton.decoder
            self._fill(decoder, self._prefix, ("embed_tokens.weight",))
            for module in decoder.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)
            self._front_is_loaded = True

    def _stored_head(self) -> Tensor:
        """The output matrix in its stored dtype, on the device."""
        weight = self.checkpoint.tensor(self.head_name())
        self.checkpoint.check_finite(weight, self.head_name())
        return weight.to(self.device)

    def _make_output_layer(self, read: Callable[[int, int], Tensor]) -> OutputLayer:
        norm, project_out = self.last_norm()[1], copy.deepcopy(self._skeleton.project_out)
        if project_out is not None:
            self._fill(project_out, f"{self._prefix}project_out.")
        rows, columns = self._skeleton.head.weight.shape
        return OutputLayer(norm, project_out, read, (rows, columns), self.dtype, self._logit_cap, self.device)


def _find(module: Any, path: str) -> Any:
    """The submodule at a path, or None."""
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module
