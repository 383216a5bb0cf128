"""The whole transformers model of a checkpoint, put together block by block, so that each block can be divided at once.

So a process that keeps a part of every block never holds more than that and one whole block.
"""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.skeleton import build_model, compute_buffers, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sizes(NamedTuple):
    """Elements of the largest block, and of all parameters outside the blocks together.

    parameters: largest number of a block's parameters. largest: elements of the largest parameter of the model.
    """

    block: int
    outside: int
    parameters: int
    largest: int


class WholeModel(Architecture):
    """An architecture whose parts are put together to a model that transformers runs."""

    def empty(self) -> "PreTrainedModel":
        """The model without weights, on the meta device."""
        model: PreTrainedModel = build_model(read_config(self.checkpoint.path), self.dtype, self.checkpoint.path)
        return model

    def sizes(self) -> Sizes:
        """Sizes of the model."""
        parameters = [weight.numel() for weight in self.empty().parameters()]
        blocks = [[weight.numel() for weight in block.parameters()] for block in self._skeleton.blocks]
        elements = [sum(block) for block in blocks]
        return Sizes(max(elements), sum(parameters) - sum(elements), max(map(len, blocks)), max(parameters))

    def assemble(self, divide: Callable[[nn.Module], object]) -> "PreTrainedModel":
        """The model with its weights; to be called once. divide: changes a loaded block in its place."""
        model, adapter = self.empty(), self.adapter
        blocks = []
        for index in range(self.num_blocks):
            block = self.load_block(index)
            divide(block)
            blocks.append(block)
        parent, _, leaf = adapter.blocks.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks))
        for path in adapter.run:
            module = model.get_submodule(path)
            compute_buffers(model, module)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        for path in (*adapter.front, *(table for table in adapter.tables if table != adapter.embedding)):
            self._fill_outer(model.get_submodule(path), path, recurse=False)
        for path in adapter.tail:
            self._fill_outer(model.get_submodule(path), path)
        embedding: Any = model.get_submodule(adapter.embedding)
        head: Any = model.get_submodule(adapter.head)
        embedding.weight = self._parameter(self.embedding_name())
        shared = adapter.tied and self.head_name() == self.embedding_name()
        head.weight = embedding.weight if shared else self._parameter(self.head_name())
        if head.bias is not None:
            head.bias = self._parameter(self._head_bias_name())
        _leave_out_unused(model)
        return model

    def _parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self._read(name), requires_grad=False)


def _leave_out_unused(module: nn.Module) -> None:
    """Replace parts that text does not run, whose parameters were not read: vision towers and their projections."""
    for name, child in list(module.named_children()):
        parameters = list(child.parameters())
        if parameters and all(parameter.is_meta for parameter in parameters):
            setattr(module, name, nn.Identity())
        elif parameters:
            _leave_out_unused(child)


def divisible_by(architecture: Architecture) -> dict[str, tuple[int, str]]:
    """What tensor parallelism divides, by layer of the first block it occurs in: a number, and what it counts.

    Attention is divided by heads, so that a KV head and its query heads are on one rank, and a feed-forward network by
    its inner width.
    """
    config = architecture.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    numbers: dict[str, tuple[int, str]] = {}
    known: set[tuple[int, str]] = set()
    for index in range(architecture.num_blocks):
        for layer in architecture.linears(index):
            leaf = layer.module.rpartition(".")[2]
            number = _divided(leaf, layer.rows, layer.columns, heads, kv_heads)
            if number not in known:
                known.add(number)
                numbers[layer.name] = number
    return numbers


def check_division(architecture: Architecture, size: int, option: str) -> None:
    """UserError unless tensor parallelism can divide all layers into `size` equal parts. option: names the size."""
    fused = next((layer.name for layer in architecture.linears(0) if layer.module.endswith("qkv_proj")), None)
    if fused is not None and size > 1:
        # transformers cuts its output by the number of all heads of the config, which is not that of a rank.
        raise UserError(
            f"{option}={size}: {fused} of {architecture.checkpoint.path} holds queries, keys and values in one matrix, "
            "which tensor parallelism does not divide: use mode=zero3"
        )
    numbers = divisible_by(architecture)
    common = gcd(*(number for number, _ in numbers.values()))
    for layer, (number, what) in numbers.items():
        if number % size:
            sizes = ", ".join(str(part) for part in range(1, common + 1) if common % part == 0)
            raise UserError(
                f"{option}={size} does not divide {layer} of {architecture.checkpoint.path}, which has {number} "
                f"{what}: all layers can be divided into {sizes}; mode=zero3 can divide by any size"
            )


def _divided(leaf: str, rows: int, columns: int, heads: int, kv_heads: int) -> tuple[int, str]:
    if leaf in ("k_proj", "v_proj"):
        return kv_heads, "KV heads"
    if leaf in ("q_proj", "o_proj", "out_proj"):
        return heads, "heads"
    return (columns if leaf in ("down_proj", "fc2") else rows), "inner columns"
