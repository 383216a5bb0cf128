"""The model of a checkpoint, described and run block by block.

Blocks are transformers' own modules, called with transformers' own rotary embeddings and masks; what runs before and
behind them is found by inspection. A call reads the weights of one block at most.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hasten.accel.activations.hadamard import InputHadamard
from hasten.accel.activations.hooks import attention_path, attention_states, rotate_inputs, set_inputs
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.data.packing import unpack
from hasten.accel.errors import UserError
from hasten.accel.models.adapter import BlockLayout, FusedExperts
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.documents import check_masks, documents_of, mark, positions_of
from hasten.accel.models.experts import Experts, Layout
from hasten.accel.models.forwards import Forward
from hasten.accel.models.inspection import NotBlockwise, adapter_of, refusal
from hasten.accel.models.output_layer import OutputLayer
from hasten.accel.models.scale_sites import ScaleSite, scale_sites
from hasten.accel.models.skeleton import (
    Call,
    Skeleton,
    Stop,
    build_model,
    compute_buffers,
    each_module,
    find,
    placeholder,
    read_config,
)
from hasten.accel.models.supplied import ReadWeights
from hasten.accel.models.tensor_names import Names

# Roles of the matrices outside the blocks: output layer, embedding, or one tensor that serves as both.
HEAD, EMBEDDING, TIED = "head", "embedding", "tied"
# Hidden states of a part that waits in a block for an expert: those behind the attention, their norm, and the sum of
# the experts before, beside those that it began with.
WAITING_STATES = 3
# A weight [rows, columns], or a function that gives it, which may be called several times.
Weight = Tensor | Callable[[], Tensor]


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

    all_experts: whether experts of blocks that are loaded from now on show all tokens, see models.experts.
    as_served: whether inputs of layers, and keys and values, are rounded where the checkpoint's config says so.

    Raises UserError where the model family is not supported, or where a tensor is missing or has a wrong shape.
    """

    # Whether experts are read when they run; ranks that divide a block run all of it together.
    streams: ClassVar[bool] = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        as_served: bool = True,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.all_experts = False
        self.rounds_inputs = as_served and checkpoint.rounds_inputs
        model_type = checkpoint.config.get("model_type")
        whole = read_config(checkpoint.path)
        self.config: Any = whole.get_text_config(decoder=True)
        try:
            self.adapter = adapter_of(whole, checkpoint.path)
        except NotBlockwise as reason:
            raise refusal(model_type, reason) from None
        self._model = build_model(whole, dtype, checkpoint.path)
        self._skeleton = Skeleton(self._model, self.config, self.adapter.blocks, self.adapter.outputs)
        self.num_blocks = len(self._skeleton.blocks)
        first = self._skeleton.blocks[0]
        self._stored_names = Names(
            checkpoint, self._model, self.adapter, [path for path, _ in first.named_parameters()]
        )
        self._head = find(self._model, self.adapter.head)
        self._embedding = find(self._model, self.adapter.embedding)
        self.hidden_size = int(getattr(self.config, "hidden_size", 0) or self._embedding.embedding_dim)
        self._arguments: dict[tuple[int, int], list[Call]] = {}
        self._linears: dict[int, list[Layer]] = {}
        self._streamed: WeakKeyDictionary[nn.Module, ReadWeights] = WeakKeyDictionary()
        self._output_layer: OutputLayer | None = None
        self._front_is_loaded = False
        self._names = self._sort_names()
        self._check_linears()
        self._check_tensors()

    @property
    def front(self) -> Any:
        """transformers' model; on the meta device, except what runs before the blocks, such as rotary embeddings."""
        self._load_front()
        return self._model

    def embed(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] that enter the first block, for tokens [B, T]; reads only these tokens' rows.

        tokens may also be packed documents [B, 2, T], which the blocks then keep apart (see data/packing.py). table:
        embedding (V, D) in place of the checkpoint's.
        """
        tokens, documents = unpack(tokens)
        documents = None if documents is None else documents.to(self.device)
        self._check_length(tokens.shape[1])
        self._load_front()
        tokens = tokens.cpu()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise UserError(f"token {wrong} is outside the model's vocabulary of {self.config.vocab_size}")

        def read(path: str, index: Tensor) -> Tensor:
            name = (
                self.embedding_name() if path == self.adapter.embedding else self._stored_names.outer(f"{path}.weight")
            )
            if table is not None and path == self.adapter.embedding:
                rows = table[index.to(table.device)]
            else:
                rows = self.checkpoint.rows(name, index)
            self.checkpoint.check_finite(rows, name)
            return rows

        entered: list[Tensor] = []

        def visit(number: int, hidden: Tensor, call: Call) -> Tensor:
            entered.append(hidden)
            raise Stop

        with self._tables(read):
            self._skeleton.run(tokens.to(self.device), visit, None if documents is None else positions_of(documents))
        return mark(entered[0], documents)

    def block_arguments(self, length: int, batch: int = 1) -> list[Call]:
        """Arguments of each block's forward besides hidden states, for sequences of this length.

        They are those of one sequence, which fit any number, unless the model makes them for each.
        """
        key = (length, batch if self.adapter.batched else 1)
        if key not in self._arguments:
            self._check_length(length)
            # Masks are quadratic in the length, and few lengths occur: only the last length's are kept.
            self._arguments = {key: self._recorded(key[1], length)}
        return self._arguments[key]

    def packed_arguments(self, documents: Tensor) -> list[Call]:
        """Arguments of each block's forward that keep documents (B, T) apart; UserError where none do."""
        batch, length = documents.shape
        calls = self._recorded(batch, length, positions_of(documents))
        check_masks(self._skeleton.blocks, calls, documents, self.checkpoint.path)
        return calls

    def check_packing(self) -> None:
        """UserError where the blocks cannot keep documents of a sequence apart."""
        self.packed_arguments(torch.tensor([[0, 1]], device=self.device))

    def _recorded(self, batch: int, length: int, positions: Tensor | None = None) -> list[Call]:
        """Calls of all blocks for sequences of this size. positions: (B, T), None for those of whole sequences."""
        self._load_front()
        calls: list[Call] = []

        def visit(number: int, hidden: Tensor, call: Call) -> Tensor:
            calls.append(call)
            if len(calls) == self.num_blocks:
                raise Stop
            return hidden

        tokens = torch.full((batch, length), min(10, self.config.vocab_size - 1), device=self.device)
        # Hidden states do not matter, so no row is read.
        with self._tables(lambda path, index: torch.zeros(len(index), find(self._model, path).embedding_dim)):
            self._skeleton.run(tokens, visit, positions)
        return calls

    def load_block(self, index: int) -> nn.Module:
        """Block with its weights, experts unfused to linear layers; UserError names a tensor that is not finite.

        Where the checkpoint's config says so, its layers rotate and round their inputs, and its attention rounds keys
        and values.
        """
        block = self._empty_block(index)
        self._fill_block(block, index)
        self._rotate_inputs(block, index)
        self._round_as_stored(block, index)
        return block.eval()

    def stream_block(self, index: int) -> nn.Module:
        """Like `load_block`, but without the weights of experts: each is read when it runs, see models.supplied.

        Forwards in `run_forwards` read it once for all of them. The same as `load_block` where not `streams`.
        """
        if not self.streams:
            return self.load_block(index)
        block = self._empty_block(index)
        experts = [layer for layer in self.linears(index) if layer.expert is not None]
        weights = ReadWeights(self.device, self.dtype)
        for layer in experts:
            module = block.get_submodule(layer.module)
            assert isinstance(module, nn.Linear)
            weights.add(layer.module, module, partial(self._read, f"{layer.name}.weight"))
        self._fill_block(block, index, {f"{layer.module}.weight" for layer in experts})
        self._streamed[block] = weights
        self._rotate_inputs(block, index)
        self._round_as_stored(block, index)
        return block.eval()

    def streamed_bytes(self, index: int) -> int:
        """Bytes of the weights that `stream_block` does not hold."""
        return self.expert_weights(index) * self.dtype.itemsize if self.streams else 0

    def expert_weights(self, index: int) -> int:
        """Number of weights of a block's experts."""
        return sum(layer.rows * layer.columns for layer in self.linears(index) if layer.expert is not None)

    def lots(self, index: int, parts: Sequence[Tensor]) -> Iterator[range]:
        """Places of the parts (B, T, D) of hidden states that run through a block of `stream_block` together.

        Parts wait in it for each of its experts. In lots they need no more memory for that than the experts would,
        which are read once for each lot. One lot, also of no parts, where nothing is read.
        """
        size, experts = max(1, len(parts)), self.streamed_bytes(index)
        if experts and parts:
            size = max(1, experts // (WAITING_STATES * max(part.nbytes for part in parts)))
        for start in range(0, max(1, len(parts)), size):
            yield range(start, min(start + size, len(parts)))

    def run_block(self, block: nn.Module, index: int, hidden: Tensor, differentiable: bool = False) -> Tensor:
        """Output [B, T, D] of block `index` for hidden [B, T, D]; differentiable: with its graph for autograd."""
        documents = documents_of(hidden)
        if documents is None:
            call = self.block_arguments(hidden.shape[1], hidden.shape[0])[index]
        else:
            call = self.packed_arguments(documents)[index]
        with torch.set_grad_enabled(differentiable):
            output = block(hidden, *call.positional, **call.named)
        return mark(output[0] if isinstance(output, tuple) else output, documents)

    def run_forwards(self, block: nn.Module, forwards: Sequence[Forward]) -> None:
        """Run forwards, each of which calls `run_block` of this block, from their start to their end.

        One after another, or layer by layer where weights are brought to the block.
        """
        for forward in forwards:
            forward.switch()
        self.supply(block, forwards)

    def supply(self, block: nn.Module, forwards: Sequence[Forward]) -> None:
        """Let forwards go on that wait for weights which are not in the block."""
        if block in self._streamed:
            with torch.no_grad():
                self._streamed[block].supply(forwards)

    def replace_weights(self, block: nn.Module, weights: Iterable[tuple[str, Weight]]) -> None:
        """Replace weights of layers of a block, by their paths in it."""
        streamed = self._streamed.get(block)
        for path, weight in weights:
            if streamed is not None and path in streamed:
                streamed.replace(path, partial(_held, weight) if isinstance(weight, Tensor) else weight)
                continue
            parameter = block.get_submodule(path).weight
            assert isinstance(parameter, nn.Parameter)
            parameter.data = (weight if isinstance(weight, Tensor) else weight()).to(parameter.device, parameter.dtype)

    def round_inputs(self, block: nn.Module, roundings: Iterable[tuple[str, InputRounding | None]]) -> None:
        """Set how layers of a block round their inputs. roundings: with the paths of the layers in the block."""
        for path, rounding in roundings:
            set_inputs(block.get_submodule(path), rounding)

    def round_attention(self, block: nn.Module, roundings: Mapping[str, InputRounding]) -> None:
        """Set how the attention of a block rounds its queries `q`, keys `k` and values `v`; others stay as they are."""
        if roundings or attention_path(block) is not None:
            states = attention_states(block)
            on_device = {name: rounding.to(self.device) for name, rounding in roundings.items()}
            states.query, states.key, states.value = (on_device.get(name) for name in "qkv")

    def attention_name(self, index: int) -> str | None:
        """Name in the checkpoint of the attention of a block; None where the block has none with a cache."""
        path = attention_path(self._skeleton.blocks[index])
        return None if path is None else self._layer(index, path, 0, 0, path).name

    def attention_classes(self) -> list[str]:
        """Names of the classes of the attentions that have a cache of keys and values."""
        found = ((block, attention_path(block)) for block in self._skeleton.blocks)
        return sorted({type(block.get_submodule(path)).__name__ for block, path in found if path is not None})

    def input_rotations(self, index: int) -> dict[str, InputHadamard]:
        """How inputs of a block's layers are rotated, by layer name; without those that are not."""
        found = ((layer.name, self.checkpoint.input_rotation(layer.name)) for layer in self.linears(index))
        return {name: rotation for name, rotation in found if rotation is not None}

    def _rotate_inputs(self, block: nn.Module, index: int) -> None:
        """Rotate inputs in a loaded block, before any hook reads them."""
        rotations = self.input_rotations(index)
        for layer in self.linears(index):
            if layer.name in rotations:
                rotate_inputs(block.get_submodule(layer.module), rotations[layer.name])

    def _round_as_stored(self, block: nn.Module, index: int) -> None:
        """Round in a loaded block what the checkpoint's config says."""
        if not self.rounds_inputs:
            return
        self.round_inputs(
            block,
            (
                (layer.module, rounding)
                for layer in self.linears(index)
                if (rounding := self.checkpoint.inputs(layer.name)) is not None
            ),
        )
        name = self.attention_name(index)
        if name is not None:
            module = block.get_submodule(attention_path(block) or "")
            roundings = self.checkpoint.attention(name, [cls.__name__ for cls in type(module).__mro__])
            if roundings:
                self.round_attention(block, roundings)

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

    def close(self) -> None:
        """Frees the output layer and the masks; a later call reads them again."""
        self._output_layer, self._arguments = None, {}

    def linears(self, index: int) -> list[Layer]:
        """Linear layers of a block in execution order; no tensor is read."""
        if index not in self._linears:
            self._linears[index] = self._find_linears(index)
        return list(self._linears[index])

    def _find_linears(self, index: int) -> list[Layer]:
        block = self._skeleton.blocks[index]
        layers: list[Layer] = []
        for item in self.layout(index).order:
            if isinstance(item, FusedExperts):
                layers += self._expert_layers(index, item.path, block.get_submodule(item.path))
                continue
            for path in item.paths:
                module = block.get_submodule(path)
                layers.append(self._layer(index, path, module.out_features, module.in_features, item.paths[0]))
        return layers

    def skipped(self, index: int) -> dict[str, tuple[str, str]]:
        """Linear layers of a block that are not among `linears`: by name, path in the block and the reason."""
        return {
            self._layer(index, path, 0, 0, path).name: (path, reason)
            for path, reason in self.layout(index).skipped.items()
        }

    def block_start(self, index: int) -> str:
        """Prefix of a block's tensors in the checkpoint."""
        return f"{self._stored_names.blocks}{index}."

    def layout(self, index: int) -> BlockLayout:
        """What a block runs."""
        return self.adapter.layouts[index]

    def _expert_layers(self, index: int, path: str, module: Any) -> Iterator[Layer]:
        for layer in Layout.of(module).layers():
            shared = f"{path}.{layer.group}"
            yield self._layer(index, f"{path}.{layer.path}", layer.rows, layer.columns, shared, layer.expert)

    def scale_sites(self, index: int) -> list[ScaleSite]:
        """Where inputs of a block's layers can be scaled without changing the block; no tensor is read."""
        start, layers = self.block_start(index), self.linears(index)
        sites = scale_sites(
            self._empty_block(index),
            layers,
            self.layout(index),
            self.config,
            lambda parameter: start + self._local(parameter),
            self.checkpoint,
        )
        # Channels that a rotation mixes are none of what makes them.
        rotations = self.input_rotations(index)
        return [site for site in sites if not any(layer.name in rotations for layer in site.layers)]

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

    def outer_linears(self) -> list[str]:
        """Paths in transformers' model of linear layers outside the blocks, except the output layer."""
        return [
            path
            for path, module in each_module(self._model, self._skeleton.recorders)
            if isinstance(module, nn.Linear) and path != self.adapter.head
        ]

    def block_tensors(self, index: int) -> list[str]:
        """Logical names of the checkpoint's tensors in a block."""
        return list(self._names.get(index, []))

    def outer_tensors(self) -> list[str]:
        """Logical names of the checkpoint's tensors outside the blocks."""
        return list(self._names.get(None, []))

    def _local(self, path: str) -> str:
        """Name of a module or parameter of a block, below the block's prefix."""
        return self._stored_names.local(path)

    def block_parameters(self, index: int) -> dict[str, str]:
        """Logical name of every parameter of a block, by its path in the block that `load_block` returns."""
        start = self.block_start(index)
        names = {f"{layer.module}.weight": f"{layer.name}.weight" for layer in self.linears(index)}
        paths = [path for path, _ in self._empty_block(index).named_parameters()]
        return names | {path: start + self._local(path) for path in paths if path not in names}

    def last_norm(self) -> tuple[str, nn.Module]:
        """Logical name of the norm behind the last block, and a copy of it with its weights."""
        for path in self.adapter.tail:
            weight = getattr(find(self._model, path), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                name = self._stored_names.outer(f"{path}.weight").removesuffix(".weight")
                return name, self._outer_copy(path)
        raise UserError(f"{self.checkpoint.config.get('model_type')} models have no norm behind their last block")

    def _outer_copy(self, path: str) -> nn.Module:
        """A copy, with its weights, of a module outside the blocks."""
        module: nn.Module = copy.deepcopy(find(self._model, path), {id(self.config): self.config})
        for inner in module.modules():
            compute_buffers(self._model, inner)
        self._fill_outer(module, path)
        return module.to(self.device)

    def _layer(self, index: int, path: str, rows: int, columns: int, shared: str, expert: int | None = None) -> Layer:
        start = self.block_start(index)
        name = self._local(f"{path}.weight").removesuffix(".weight")
        return Layer(start + name, path, rows, columns, start + shared, expert)

    def _empty_block(self, index: int) -> Any:
        """Block on the meta device, with experts as linear layers, and with the buffers that are not in checkpoints."""
        original = self._skeleton.blocks[index]
        # In the original, where transformers finds them; the copy takes the values.
        for module in original.modules():
            compute_buffers(self._model, module)
        block: Any = copy.deepcopy(original, {id(self.config): self.config})
        for module in original.modules():
            module._buffers = {
                name: None if value is None else value.to("meta") for name, value in module._buffers.items()
            }
        for item in self.layout(index).experts:
            parent, _, leaf = item.path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Experts(block.get_submodule(item.path), self.all_experts))
        return block

    def _fill_block(self, block: nn.Module, index: int, without: Collection[str] = ()) -> None:
        """Read the parameters of a block, except those `without`, and the buffers that are in the checkpoint."""
        start = self.block_start(index)
        self._fill(block, lambda path: start + self._local(path), without)
        for path, module in block.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is None:
                    continue
                local = f"{path}.{leaf}" if path else leaf
                name = start + self._local(local)
                if leaf not in module._non_persistent_buffers_set and name in self.checkpoint:
                    buffer = self.checkpoint.tensor(name).to(buffer.dtype)
                module._buffers[leaf] = buffer.to(self.device)

    def _sort_names(self) -> dict[int | None, list[str]]:
        pattern = re.compile(re.escape(self._stored_names.blocks) + r"(\d+)\.")
        names: dict[int | None, list[str]] = {}
        for name in self.checkpoint.names:
            match = pattern.match(name)
            number = int(match[1]) if match else None
            names.setdefault(None if number is None or number >= self.num_blocks else number, []).append(name)
        return names

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Logical name and shape of every tensor that the model needs."""
        for index, block in enumerate(self._skeleton.blocks):
            layers = self.linears(index)
            for layer in layers:
                yield f"{layer.name}.weight", (layer.rows, layer.columns)
            known = {f"{layer.module}.weight" for layer in layers}
            fused = tuple(f"{item.path}." for item in self.layout(index).experts)
            for local, parameter in block.named_parameters():
                if local not in known and not (fused and local.startswith(fused)):
                    yield self.block_start(index) + self._local(local), tuple(parameter.shape)
        yield self.embedding_name(), (self._embedding.num_embeddings, self._embedding.embedding_dim)
        yield self.head_name(), tuple(self._head.weight.shape)
        tables = [path for path in self.adapter.tables if path != self.adapter.embedding]
        for path in (*self.adapter.front, *self.adapter.tail, *tables):
            for local, parameter in find(self._model, path).named_parameters():
                yield self._stored_names.outer(f"{path}.{local}"), tuple(parameter.shape)
        if self._head.bias is not None:
            yield self._head_bias_name(), tuple(self._head.bias.shape)

    def _check_length(self, length: int) -> None:
        # Rotary embeddings exist for any position, learned ones do not.
        limit = getattr(self.config, "max_position_embeddings", None)
        learned = any(isinstance(find(self._model, path), nn.Embedding) for path in self.adapter.front)
        if learned and limit is not None and length > limit:
            raise UserError(f"sequence length {length} is too long for the model: it has learned {limit} positions")

    def _check_linears(self) -> None:
        """UserError where the blocks have no linear layer that can be compressed."""
        if any(self.layout(index).order for index in range(self.num_blocks)):
            return
        reasons = [reason for index in range(self.num_blocks) for reason in self.layout(index).skipped.values()]
        block = self._skeleton.blocks[0]
        kinds = sorted(
            {type(module).__name__ for module in block.modules() if getattr(module, "weight", None) is not None}
        )
        others = reasons[0] if reasons else f"they hold {', '.join(kinds)}"
        raise refusal(
            self.checkpoint.config.get("model_type"),
            NotBlockwise(f"its blocks have no linear layer that can be compressed: {others}"),
        )

    def _check_tensors(self) -> None:
        for name, shape in self._expected():
            stored = self.checkpoint.shape(name)
            if stored != shape:
                where = f"in {self.checkpoint.path} has shape {list(stored)}"
                raise UserError(f"tensor {name} {where}: the config needs {list(shape)}")

    def embedding_name(self) -> str:
        """Logical name of the tensor that the embedding is read from."""
        return self._stored_names.embedding()

    def head_name(self) -> str:
        """Logical name of the tensor that the output projection is read from."""
        return self._stored_names.head()

    def _head_bias_name(self) -> str:
        return self._stored_names.outer(f"{self.adapter.head}.bias")

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        self.checkpoint.check_finite(tensor, name)
        return tensor.to(self.device, self.dtype)

    def _fill(
        self, module: nn.Module, name_of: Callable[[str], str], without: Collection[str] = (), recurse: bool = True
    ) -> None:
        """Read every parameter of a module on the meta device, except those `without`.

        name_of: name in the checkpoint of a path in the module. recurse: whether to read those of its submodules, too.
        """
        for local, _ in list(module.named_parameters(recurse=recurse)):
            if local not in without:
                parent, _, leaf = local.rpartition(".")
                tensor = self._read(name_of(local))
                setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))

    def _fill_outer(self, module: nn.Module, path: str, recurse: bool = True) -> None:
        """Read the parameters of a module outside the blocks. path: in the model."""
        self._fill(module, lambda local: self._stored_names.outer(f"{path}.{local}"), recurse=recurse)

    def _load_front(self) -> None:
        """Load what runs before the blocks, except tables of tokens: positions, projections, norms and buffers."""
        if not self._front_is_loaded:
            for path in self.adapter.run:
                module = find(self._model, path)
                compute_buffers(self._model, module)
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)
            for path in self.adapter.front:
                self._fill_outer(find(self._model, path), path, recurse=False)
            self._front_is_loaded = True

    @contextmanager
    def _tables(self, read: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Let tables of tokens hold the rows in use. read(path, index): rows of the table with this path."""
        handles = []
        shapes = {path: find(self._model, path).weight for path in self.adapter.tables}
        for path in self.adapter.tables:
            module: Any = find(self._model, path)

            def enter(module: Any, inputs: tuple[Any, ...], path: str = path) -> tuple[Any, ...]:
                unique, places = inputs[0].cpu().unique(return_inverse=True)
                # padding_idx counts rows of the whole table.
                module.padding_idx = None
                rows = read(path, unique).to(self.device, self.dtype)
                module.weight = nn.Parameter(rows, requires_grad=False)
                return (places.to(self.device), *inputs[1:])

            def leave(module: Any, inputs: object, output: object) -> None:
                module.weight = placeholder(module, self.device)

            module.weight = placeholder(module, self.device)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for path, weight in shapes.items():
                find(self._model, path).weight = weight

    def _stored_head(self) -> Tensor:
        """The output matrix in its stored dtype, on the device."""
        weight = self.checkpoint.tensor(self.head_name())
        self.checkpoint.check_finite(weight, self.head_name())
        return weight.to(self.device)

    def _make_output_layer(self, read: Callable[[int, int], Tensor]) -> OutputLayer:
        tail = [self._outer_copy(path) for path in self.adapter.tail]
        rows, columns = self._head.weight.shape
        bias = None if self._head.bias is None else self._read(self._head_bias_name())
        adapter = self.adapter
        name = self.head_name()
        # A head that is not quantized is none of the layers that the config describes, even if a class name matches it.
        is_described = self.rounds_inputs and self.checkpoint.quantization(name) is not None
        rounding = self.checkpoint.inputs(name.removesuffix(".weight")) if is_described else None
        return OutputLayer(
            tail,
            read,
            (rows, columns),
            self.dtype,
            adapter.cap,
            self.device,
            adapter.logit_scale,
            adapter.input_scale,
            bias,
            None if rounding is None else rounding.to(self.device),
        )


def _held(weight: Tensor) -> Tensor:
    return weight
