"""Hydra's layout: hydra_lm_head.pt, with blocks and a full output layer for each depth, and Hydra++'s prefix layer.

Source: github.com/zankner/Hydra. Its names count dropout layers in Hydra++, and its rotary embedding has the base 10000
whatever the target's is. Files may hold an embedding and rotary frequencies that nothing uses: they are not written,
and are skipped when a file is read. Heads that read no drafted tokens, which its code can train too, are refused.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, TargetFacts
from hasten.accel.training.heads.hydra import Hydra, HydraNetwork
from hasten.accel.training.heads.hydra_pp import HydraPP
from hasten.accel.training.heads.layouts.base import (
    Layout,
    check_full_vocabulary,
    fill,
    read_config,
    read_tensors,
    write_config,
    write_tensors,
)
from hasten.accel.training.heads.vocabulary import DraftVocabulary

FILE = "hydra_lm_head.pt"
_MLP, _PREFIX_MLP = "mlp", "prefix-mlp"
_ROPE_THETA = 10000.0
_PREFIX = "prefix_embeding_layer."  # as their code spells it
_LAYER = _PREFIX + "layers.0."
# Our names of the prefix layer, and theirs, of which some of ours hold several, one after the other.
_PREFIX_NAMES = {
    "prefix.attention_norm.weight": (_LAYER + "input_layernorm.weight",),
    "prefix.attention.qkv.weight": tuple(f"{_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
    "prefix.attention.out.weight": (_LAYER + "self_attn.o_proj.weight",),
    "prefix.mlp_norm.weight": (_LAYER + "post_attention_layernorm.weight",),
    "prefix.mlp.gate_up.weight": tuple(f"{_LAYER}mlp.{name}_proj.weight" for name in ("gate", "up")),
    "prefix.mlp.down.weight": (_LAYER + "mlp.down_proj.weight",),
    "norm.weight": (_PREFIX + "norm.weight",),
}
_UNUSED = re.compile(re.escape(_PREFIX) + r"(embed_tokens\.weight|layers\.0\.self_attn\.rotary_emb\..*)")
_BLOCK = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.((?:linear|res_connection)\.(?:weight|bias))")
_OUTPUT = re.compile(r"hydra_lm_head\.(\d+)\.(?:1\.)?(weight|bias)")


class HydraLayout(Layout):
    """Layout of Hydra's and Hydra++'s heads."""

    name: ClassVar[str] = "hydra"
    heads: ClassVar[tuple[type[DraftHead], ...]] = (Hydra, HydraPP)

    def matches(self, folder: Path) -> bool:
        """By the file of its tensors."""
        return (folder / FILE).is_file()

    def write(self, network: DraftNetwork, head: DraftHead, folder: Path, facts: TargetFacts, target: str) -> None:
        """The file and its config; UserError for a reduced vocabulary, and for what their code would compute wrongly.

        That is blocks behind the first of a depth that differ, and, for Hydra++, another rotary embedding or head size.
        """
        assert isinstance(network, HydraNetwork)
        assert isinstance(head, Hydra)
        check_full_vocabulary(network, self.name)
        prefixed = isinstance(head, HydraPP)
        state = network.state_dict()
        tensors = _prefix_of(state, facts) if prefixed else {}
        for depth in range(head.depth):
            of_depth = {name: value for name, value in state.items() if name.startswith(f"heads.{depth}.")}
            _check_repeated(of_depth, depth, head.blocks)
            for name, value in of_depth.items():
                _, _, block, part = name.split(".", 3)
                tensors[f"hydra_mlp.{depth}.{_place(int(block), prefixed)}.{part}"] = value
            own = f"outputs.{min(depth, len(network.outputs) - 1)}"
            theirs = f"hydra_lm_head.{depth}.1" if prefixed else f"hydra_lm_head.{depth}"
            tensors |= {f"{theirs}.{part}": state[f"{own}.{part}"] for part in ("weight", "bias")}
        write_tensors(folder / FILE, tensors)
        config = {
            "hydra_num_heads": head.depth,
            "hydra_num_layers": head.blocks,
            "hydra_head_arch": _PREFIX_MLP if prefixed else _MLP,
            "base_model_name_or_path": target,
            "grounded_heads": True,
            "hidden_state_offset": 0,
        }
        write_config(folder, config)

    def read(self, folder: Path, facts: TargetFacts) -> tuple[Hydra, DraftNetwork]:
        """A head with all ids, and an output layer for each depth."""
        config = read_config(folder)
        for key, expected in (("grounded_heads", True), ("hidden_state_offset", 0)):
            if config.get(key, expected) != expected:
                raise UserError(f"{folder} has {key}={config[key]} in its config: only heads with {expected} are read")
        path = folder / FILE
        tensors = {name: value for name, value in read_tensors(path).items() if not _UNUSED.fullmatch(name)}
        prefixed = any(name.startswith(_PREFIX) for name in tensors)
        renamed = _own_prefix(tensors, path) if prefixed else {}
        places: set[int] = set()
        for name, value in tensors.items():
            if block := _BLOCK.fullmatch(name):
                place = int(block[2])
                places.add(place)
                renamed[f"heads.{block[1]}.{place // 2 if prefixed else place}.{block[3]}"] = value
            elif output := _OUTPUT.fullmatch(name):
                renamed[f"outputs.{output[1]}.{output[2]}"] = value
            elif not name.startswith(_PREFIX):
                raise UserError(f"{path} is not a file of Hydra's heads: it has a tensor {name}")
        depth = sum(name.endswith("res_connection.weight") for name in renamed)
        if not depth:
            raise UserError(f"{path} has no res_connection: only heads that read drafted tokens are read")
        kind = HydraPP if prefixed else Hydra
        head = kind(depth=depth, blocks=len(places))
        network = head.build(replace(facts, rope_theta=_ROPE_THETA), DraftVocabulary.full(facts.vocabulary))
        return head, fill(network, renamed, folder)


def _place(block: int, prefixed: bool) -> int:
    """Place of a block in their sequence, in which each of Hydra++'s follows a dropout layer."""
    return 2 * block + 1 if prefixed else block


def _check_repeated(of_depth: dict[str, Tensor], depth: int, blocks: int) -> None:
    for block in range(2, blocks):
        for part in ("weight", "bias"):
            first, other = (of_depth[f"heads.{depth}.{number}.linear.{part}"] for number in (1, block))
            if not torch.equal(first, other):
                raise UserError(
                    f"blocks={blocks} that differ cannot be written in the layout hydra, whose own code repeats the "
                    "second block: train with head.shares_blocks=true"
                )


def _prefix_of(state: dict[str, Tensor], facts: TargetFacts) -> dict[str, Tensor]:
    """Their tensors of the prefix layer."""
    if facts.rope_theta != _ROPE_THETA or facts.head_dim * facts.heads != facts.hidden_size:
        raise UserError(
            f"the target has rope_theta {facts.rope_theta:g} and {facts.heads} heads of {facts.head_dim}: Hydra++'s "
            f"own code has {_ROPE_THETA:g}, and heads that divide the hidden size {facts.hidden_size}"
        )
    rows = {
        "prefix.attention.qkv.weight": [facts.heads * facts.head_dim] + 2 * [facts.kv_heads * facts.head_dim],
        "prefix.mlp.gate_up.weight": 2 * [facts.intermediate_size],
    }
    return {
        name: part
        for own, names in _PREFIX_NAMES.items()
        for name, part in zip(names, state[own].split(rows.get(own, [len(state[own])])), strict=True)
    }


def _own_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    missing = [name for names in _PREFIX_NAMES.values() for name in names if name not in tensors]
    if missing:
        raise UserError(f"{path} is damaged, or has another prefix layer: it lacks {missing[0]}")
    return {own: torch.cat([tensors[name] for name in names]) for own, names in _PREFIX_NAMES.items()}
