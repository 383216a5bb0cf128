"""Medusa's layout: medusa_lm_head.pt or .safetensors, with blocks and a full output layer for each depth.

Source: github.com/FasterDecoding/Medusa and its published heads for Vicuna, in which config.json counts fewer heads
than the file holds: they are counted in the file. The project's own code reads the .pt file, others the .safetensors
file, so both are written. Its later heads ("version": "2") have no output layers, because they use the target's; they
cannot be read.
"""

import re
from pathlib import Path
from typing import ClassVar

import torch

from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, TargetFacts
from hasten.accel.training.heads.layouts.base import (
    Layout,
    check_full_vocabulary,
    fill,
    read_tensors,
    write_config,
    write_tensors,
)
from hasten.accel.training.heads.medusa import Medusa, MedusaNetwork
from hasten.accel.training.heads.vocabulary import DraftVocabulary

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")


class MedusaLayout(Layout):
    """Layout of Medusa's heads."""

    name: ClassVar[str] = "medusa"
    heads: ClassVar[tuple[type[DraftHead], ...]] = (Medusa,)

    def matches(self, folder: Path) -> bool:
        """By the file of its tensors."""
        return any((folder / name).is_file() for name in FILES)

    def write(self, network: DraftNetwork, head: DraftHead, folder: Path, facts: TargetFacts, target: str) -> None:
        """Both files and the config; UserError for a reduced vocabulary, and for different blocks of a depth."""
        assert isinstance(network, MedusaNetwork)
        assert isinstance(head, Medusa)
        check_full_vocabulary(network, self.name)
        state = network.state_dict()
        tensors: dict[str, torch.Tensor] = {}
        for depth in range(head.depth):
            for part in ("weight", "bias"):
                blocks = [state[f"heads.{depth}.{block}.linear.{part}"] for block in range(head.blocks)]
                if any(not torch.equal(block, blocks[0]) for block in blocks):
                    raise UserError(
                        f"blocks={head.blocks} cannot be written in the layout {self.name}, whose own code repeats one "
                        "block: train with head.blocks=1"
                    )
                tensors |= {f"{depth}.{block}.linear.{part}": tensor for block, tensor in enumerate(blocks)}
            tensors[f"{depth}.{head.blocks}.weight"] = state[f"outputs.{min(depth, len(network.outputs) - 1)}.weight"]
        for name in FILES:
            write_tensors(folder / name, tensors)
        write_config(
            folder,
            {
                "medusa_num_heads": head.depth,
                "medusa_num_layers": head.blocks,
                "base_model_name_or_path": target,
            },
        )

    def read(self, folder: Path, facts: TargetFacts) -> tuple[Medusa, DraftNetwork]:
        """A head with all ids, and an output layer for each depth."""
        path = next(folder / name for name in FILES if (folder / name).is_file())
        tensors = read_tensors(path)
        blocks = [match for name in tensors if (match := _BLOCK.fullmatch(name))]
        outputs = [match for name in tensors if (match := _OUTPUT.fullmatch(name))]
        if len(blocks) + len(outputs) < len(tensors) or not blocks:
            raise UserError(f"{path} is not a file of Medusa's heads: it has tensors {', '.join(list(tensors)[:3])}, …")
        if not outputs:
            raise UserError(
                f"{path} has no output layers: heads of Medusa's version 2, which use the target's, are not read"
            )
        head = Medusa(
            depth=1 + max(int(match[1]) for match in outputs),
            blocks=1 + max(int(match[2]) for match in blocks),
        )
        renamed = {f"heads.{match[0]}": tensors[match[0]] for match in blocks}
        renamed |= {f"outputs.{match[1]}.weight": tensors[match[0]] for match in outputs}
        network = head.build(facts, DraftVocabulary.full(facts.vocabulary))
        return head, fill(network, renamed, folder)
