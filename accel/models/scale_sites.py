"""Where the input of linear layers can be scaled channel by channel without changing what a block computes.

The scale of a channel goes into what makes the channel: the weight of the norm before the layers, or the rows of a
linear layer where what lies between is linear in its output (values of attention, the up projection of a gated
network) or positively homogeneous (ReLU). Sources: Xiao et al. 2022, arXiv:2211.10438; Lin et al. 2023,
arXiv:2306.00978.

Sites are derived from the modules of a block, and a network's by running it with given outputs of its first layers. A
block with modules that this derivation does not know has fewer sites.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hasten.accel.models.adapter import BlockLayout
from hasten.accel.models.experts import DOWN, GATE, UP

if TYPE_CHECKING:
    from hasten.accel.models.architecture import Layer

NORM, LINEAR = "norm", "linear"
# Norms before attention and before the feed-forward network; others lie behind them, or on queries and keys.
_BEFORE_ATTENTION = ("input_layernorm", "self_attn_layer_norm")
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "final_layer_norm")
# Modules of a block that hold matrices.
_MIXERS = ("self_attn", "mlp", "fc1", "fc2")
# Matrices beside the linear layers that read the input of a mixture.
_ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "mlp.shared_expert_gate.weight")
_GATE_UP = "gate_up_proj"
# Norms in attention that the values do not go through.
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


class Stored(Protocol):
    """The names of tensors in a checkpoint."""

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True)
class ScaleSite:
    """Input channels of some layers, which can be scaled.

    layers: linear layers that read the channels. readers: names of further matrices that do. kind: of what makes the
    channels. source: names of its tensors, the weight and maybe a bias. first: row of the first channel in them. heads:
    (key-value heads, channels of a head, query heads that read each) where a channel of the source is read several
    times; None where it is read once. offset: a norm multiplies by offset + weight.
    """

    key: str
    layers: tuple["Layer", ...]
    readers: tuple[str, ...]
    kind: str
    source: tuple[str, ...]
    first: int = 0
    heads: tuple[int, int, int] | None = None
    offset: float = 0.0

    @property
    def channels(self) -> int:
        """Number of input channels of the layers."""
        return self.layers[0].columns

    def expanded(self, scale: Tensor) -> Tensor:
        """Scale of every input channel (C,), of the scale of every channel of the source."""
        if self.heads is None:
            return scale
        number, size, repeats = self.heads
        return scale.reshape(number, 1, size).expand(number, repeats, size).reshape(-1)

    def reduced(self, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """A value for every channel of the source. reduce: of (N, repeats) values to (N,)."""
        if self.heads is None:
            return values
        number, size, repeats = self.heads
        return reduce(values.reshape(number, repeats, size).transpose(1, 2).reshape(-1, repeats))


def scale_sites(
    block: nn.Module,
    layers: Sequence["Layer"],
    layout: BlockLayout,
    config: Any,
    logical: Callable[[str], str],
    stored: Stored,
) -> list[ScaleSite]:
    """Sites of a block, whose parameters may be on the meta device.

    layers: its linear layers. layout: what it runs. logical: name in the checkpoint of a parameter of the block.
    stored: names in the checkpoint.
    """
    by_path = {layer.module: layer for layer in layers}
    sites = _norm_sites(block, layers, layout, config, logical, stored)
    sites += _value_sites(block, by_path, config, stored)
    return sites + _inner_sites(block, by_path, config, stored)


def _norm_sites(
    block: nn.Module,
    layers: Sequence["Layer"],
    layout: BlockLayout,
    config: Any,
    logical: Callable[[str], str],
    stored: Stored,
) -> list[ScaleSite]:
    known = {f"{layer.module}.weight" for layer in layers}
    sites = []
    for path, starts in _norms(block, config):
        norm: Any = block.get_submodule(path)
        width = norm.weight.shape[0]
        read = [layer for layer in layers if layer.module.startswith(starts) and _reads_norm(layer, width)]
        others = [
            name
            for name, parameter in block.named_parameters()
            if name.startswith(starts) and name not in known and parameter.ndim == 2 and parameter.shape[1] == width
        ]
        offset = _offset(norm)
        if not read or offset is None or not set(others) <= set(_ROUTERS) or not _is_read(layout, read, path):
            continue
        name = logical(f"{path}.weight").removesuffix(".weight")
        source = [f"{name}.weight", f"{name}.bias"]
        names = tuple(tensor for tensor in source if tensor in stored)
        readers = tuple(map(logical, others))
        sites.append(ScaleSite(name, tuple(read), readers, NORM, names, offset=offset))
    return sites


def _norms(block: nn.Module, config: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Norms that can be scaled, and how the names of all that reads their output begin."""
    holders = {name.partition(".")[0] for name, parameter in block.named_parameters() if parameter.ndim > 1}
    if not holders <= set(_MIXERS) or not getattr(config, "do_layer_norm_before", True):
        return []
    children = dict(block.named_children())
    attention = next((name for name in _BEFORE_ATTENTION if name in children), None)
    mlp = next((name for name in _BEFORE_MLP if name in children), None)
    # Without a second norm, attention and feed-forward network may read the same one.
    behind = mlp == "post_attention_layernorm" and "post_feedforward_layernorm" in children
    if attention is None or mlp is None or behind:
        return []
    return [(attention, ("self_attn.",)), (mlp, ("mlp.", "fc1"))]


def _is_read(layout: BlockLayout, layers: Sequence["Layer"], norm: str) -> bool:
    """Whether it is a norm's output that layers read, those of experts aside, which see a choice of its rows."""
    paths = {layer.module for layer in layers}
    return all(group.norm == norm for group in layout.groups if not paths.isdisjoint(group.paths))


def _reads_norm(layer: "Layer", width: int) -> bool:
    """Whether a layer is the first of its part: the width may be that of the inner layers, too."""
    return layer.columns == width and not layer.module.endswith(("o_proj", "out_proj", "down_proj", "fc2"))


def _offset(norm: nn.Module) -> float | None:
    """The offset of a norm that multiplies by offset + weight; None where it does something else."""
    copied: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    width = copied.weight.shape[0]
    inputs = torch.linspace(-1.0, 1.5, width)[None]
    outputs = []
    for value in (0.0, 1.0, 2.0):
        for name, parameter in copied.named_parameters():
            parameter.data.fill_(value if name == "weight" else 0.0)
        with torch.no_grad():
            outputs.append(copied(inputs))
    step = outputs[1] - outputs[0]
    if not torch.allclose(outputs[2] - outputs[1], step, atol=1e-5) or not bool(step.abs().max() > 0):
        return None
    ratio = outputs[0].abs().sum() / step.abs().sum()
    return float(ratio.round()) if torch.allclose(outputs[0], ratio.round() * step, atol=1e-5) else None


def _value_sites(block: nn.Module, by_path: dict[str, "Layer"], config: Any, stored: Stored) -> list[ScaleSite]:
    """The input of attention's output projection, whose channels are made by the rows of the values."""
    attention = getattr(block, "self_attn", None)
    last = by_path.get("self_attn.o_proj") or by_path.get("self_attn.out_proj")
    if attention is None or last is None:
        return []
    norms = {
        name.partition(".")[0]
        for name, parameter in attention.named_parameters()
        if parameter.ndim == 1 and "bias" not in name
    }
    if not norms <= set(_HEAD_NORMS) or hasattr(attention, "v_norm"):
        return []
    heads = int(config.num_attention_heads)
    size = last.columns // heads
    source, first = by_path.get("self_attn.v_proj"), 0
    width = 0 if source is None else source.rows
    if source is None:
        source = by_path.get("self_attn.qkv_proj")
        if source is None:
            return []
        width = size * int(getattr(config, "num_key_value_heads", None) or heads)
        first = source.rows - width
    if width % size or last.columns % width:
        return []
    repeats = last.columns // width
    grouped = None if repeats == 1 else (width // size, size, repeats)
    return [ScaleSite(last.name, (last,), (), LINEAR, _tensors(source, stored), first, grouped)]


def _inner_sites(block: nn.Module, by_path: dict[str, "Layer"], config: Any, stored: Stored) -> list[ScaleSite]:
    """The inputs of the second layers of feed-forward networks, experts among them."""
    sites = []
    linear: dict[str, bool] = {}
    for path, layer in by_path.items():
        parent, _, leaf = path.rpartition(".")
        if leaf == DOWN:
            up, fused = by_path.get(f"{parent}.{UP}"), by_path.get(f"{parent}.{_GATE_UP}")
            # Experts of a mixture are alike.
            kind = parent if layer.expert is None else parent.rpartition(".")[0]
            if kind not in linear:
                linear[kind] = _is_linear_in_up(block.get_submodule(parent))
            if not linear[kind]:
                continue
            if up is not None and f"{parent}.{GATE}" in by_path:
                sites.append(ScaleSite(layer.name, (layer,), (), LINEAR, _tensors(up, stored)))
            elif fused is not None:
                sites.append(ScaleSite(layer.name, (layer,), (), LINEAR, _tensors(fused, stored), layer.columns))
        elif leaf == "fc2" and "fc1" in by_path and getattr(config, "activation_function", None) == "relu":
            sites.append(ScaleSite(layer.name, (layer,), (), LINEAR, _tensors(by_path["fc1"], stored)))
    return sites


class _Given(nn.Module):
    """Stands for a linear layer that returns a known output, or its input where that is None."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self._output = output

    def forward(self, inputs: Tensor) -> Tensor:
        """The output."""
        return inputs if self._output is None else self._output


def _is_linear_in_up(network: nn.Module) -> bool:
    """Whether a feed-forward network's inner values are linear in the output of its up projection."""
    names = [name for name in (GATE, UP, _GATE_UP, DOWN) if isinstance(getattr(network, name, None), nn.Module)]
    if DOWN not in names or not ({GATE, UP} <= set(names) or _GATE_UP in names):
        return False
    copied = copy.copy(network)
    copied._modules = dict(network._modules)
    # Large values, which an activation may clamp.
    gate, up = torch.linspace(-40.0, 50.0, 64)[None, None], torch.linspace(30.0, -60.0, 64)[None, None]
    found = []
    for factor in (1.0, 3.0):
        outputs = {GATE: gate, UP: factor * up, _GATE_UP: torch.cat([gate, factor * up], -1), DOWN: None}
        for name in names:
            copied._modules[name] = _Given(outputs[name])
        with torch.no_grad():
            found.append(copied(torch.zeros_like(gate)))
    return bool(torch.allclose(found[1], 3.0 * found[0], rtol=1e-5, atol=1e-6))


def _tensors(layer: "Layer", stored: Stored) -> tuple[str, ...]:
    return tuple(name for name in (f"{layer.name}.weight", f"{layer.name}.bias") if name in stored)
