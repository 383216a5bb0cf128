"""The transformers model of a checkpoint without its weights, whose blocks hand their calls over.

Parameters are on the meta device. Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed
by transformers itself.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError


class NotRun:
    """What a Recorder returns besides hidden states: no block may need it."""


NOT_RUN = NotRun()


@dataclass(frozen=True)
class Call:
    """The call of a block, without its hidden states.

    positional, named: arguments besides the hidden states.
    """

    positional: tuple[object, ...]
    named: dict[str, object]

    @property
    def is_incomplete(self) -> bool:
        """Whether an argument is what the block before returns besides hidden states, which is not known."""
        return any(value is NOT_RUN for value in (*self.positional, *self.named.values()))


# Called with the block's number, hidden states and the call; returns the hidden states that go on.
Visit = Callable[[int, Tensor, Call], Tensor]


class Stop(Exception):  # noqa: N818 (not an error: what follows need not run)
    """All that was asked for has run."""


class Recorder(nn.Module):
    """Replacement of a block that hands its call over; it has the block's attributes, which decoders read."""

    def __init__(self, block: nn.Module, number: int, owner: "Skeleton") -> None:
        super().__init__()
        # Not as a submodule, whose parameters would be the model's.
        self.__dict__["block"] = block
        self.__dict__["owner"] = owner
        self.number = number
        self._hidden_name = next(iter(inspect.signature(block.forward).parameters))

    def forward(self, *positional: Any, **named: Any) -> object:
        """What the visitor returns, in the form in which the block returns its output."""
        hidden = positional[0] if positional else named.pop(self._hidden_name)
        output = self.owner.visit(self.number, hidden, Call(positional[1:], named))
        return (output, *[NOT_RUN] * (self.owner.outputs - 1)) if self.owner.outputs else output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class Skeleton:
    """A model on the meta device, whose blocks are Recorders.

    config: of the model that produces text. model: transformers' whole model. blocks: the original blocks. outputs: see
    Adapter.
    """

    def __init__(self, model: Any, config: Any, blocks: str, outputs: int = 0) -> None:
        self.model, self.config, self.outputs = model, config, outputs
        self.blocks = list(model.get_submodule(blocks))
        self.recorders = nn.ModuleList(Recorder(block, number, self) for number, block in enumerate(self.blocks))
        parent, _, leaf = blocks.rpartition(".")
        setattr(model.get_submodule(parent), leaf, self.recorders)
        self._visit: Visit | None = None

    def visit(self, number: int, hidden: Tensor, call: Call) -> Tensor:
        """Called by Recorders."""
        assert self._visit is not None
        return self._visit(number, hidden, call)

    def run(self, tokens: Tensor, visit: Visit, positions: Tensor | None = None) -> Tensor | None:
        """Logits of tokens [B, T] with this visitor of the blocks; None where something stopped the model.

        positions: (B, T), None for those that the model gives them itself.
        """
        given = {} if positions is None else {"position_ids": positions}
        self._visit = visit
        table: Any = self.model.get_input_embeddings()
        weight = table.weight if isinstance(table, nn.Embedding) else None
        # Some models move the tokens to the device of their table.
        here = None
        if weight is not None and weight.is_meta:
            rows = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=tokens.device)
            here = table.weight = nn.Parameter(rows.expand(weight.shape), requires_grad=False)
        try:
            with torch.no_grad():
                output = self.model(input_ids=tokens, use_cache=False, **given)
        except Stop:
            return None
        finally:
            self._visit = None
            if here is not None and table.weight is here:
                table.weight = weight
        logits: Tensor = output.logits
        return logits


def read_config(folder: Path) -> Any:
    """transformers' config of a checkpoint; UserError where transformers refuses it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _REFUSALS as error:
        raise _refusal(folder, error) from None
    # This package reads and unpacks the weights, so transformers must build the plain model.
    vars(config).pop("quantization_config", None)
    return config


def build_model(config: Any, dtype: torch.dtype, folder: Path) -> Any:
    """transformers' model for a config, on the meta device; UserError where transformers refuses the config.

    folder: of the checkpoint, for error messages.
    """
    kind = model_class(config, folder)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype)
        model.tie_weights()
    except _REFUSALS as error:
        raise _refusal(folder, error) from None
    return model.eval().requires_grad_(False)


def compute_buffers(model: Any, module: nn.Module) -> None:
    """Compute a module's own buffers that are on the meta device."""
    missing = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    if not missing:
        return
    for name, buffer in missing.items():
        unknown = torch.nan if buffer.is_floating_point() else 0
        module._buffers[name] = torch.full_like(buffer, unknown, device="cpu")
    # The method by which transformers fills them when it loads a checkpoint. It would fill the module's weights, too.
    weights = dict(module._parameters)
    for name, weight in weights.items():
        module._parameters[name] = None if weight is None else nn.Parameter(weight.to("meta"), requires_grad=False)
    if isinstance(module, nn.Embedding):
        # Which may hold a few rows only.
        module.weight = nn.Parameter(torch.empty(module.num_embeddings, module.embedding_dim, device="meta"), False)
    with torch.no_grad():
        model._init_weights(module)
        module._parameters.update(weights)
        if any(buffer is not None and bool(buffer.isnan().any()) for buffer in map(module._buffers.get, missing)):
            # Some are filled where the method is called for the whole decoder.
            for whole in model.modules():
                if hasattr(whole, "_init_weights"):
                    model._init_weights(whole)


def placeholder(table: nn.Embedding, device: torch.device | str = "cpu") -> nn.Parameter:
    """Zeros in the shape of a table, which take no memory: some models look at its shape and device, or at one row."""
    zeros = torch.zeros(1, table.embedding_dim, dtype=table.weight.dtype, device=device)
    return nn.Parameter(zeros.expand(table.num_embeddings, -1), requires_grad=False)


def find(module: Any, path: str) -> Any:
    """The submodule at a path, or None."""
    for part in path.split(".") if path else ():
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def each_module(module: nn.Module, without: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all submodules, except one of them with all below it."""
    left_out = set(map(id, without.modules()))
    return ((path, child) for path, child in module.named_modules() if id(child) not in left_out)


_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, ImportError)


def _refusal(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"transformers cannot build a model from {folder / 'config.json'}: {reason}")


def model_class(config: Any, folder: Path) -> Any:
    """Class of the model with an output layer over the vocabulary."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = [
        mapping
        for name in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
        if (mapping := getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES", None)) is not None
    ]
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    if any(named in mapping.values() for mapping in mappings) and hasattr(transformers, str(named)):
        return getattr(transformers, str(named))
    for mapping in mappings:
        if config.model_type in mapping:
            return getattr(transformers, mapping[config.model_type])
    raise UserError(
        f"model_type={config.model_type!r} of {folder} is not supported: transformers {transformers.__version__} has "
        "no language model of this type"
    )
