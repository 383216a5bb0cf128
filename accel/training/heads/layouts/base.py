"""The interface of layouts: how other programs store a trained head in a folder.

To add a layout, write a module with a subclass of `Layout` in this package; nothing lists them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, TargetFacts

CONFIG = "config.json"


class Layout(ABC):
    """A layout. name: what users call it. heads: kinds of heads that it can hold."""

    name: ClassVar[str]
    heads: ClassVar[tuple[type[DraftHead], ...]]

    @abstractmethod
    def matches(self, folder: Path) -> bool:
        """Whether a folder is of this layout, by the names of its files and its config."""

    @abstractmethod
    def write(self, network: DraftNetwork, head: DraftHead, folder: Path, facts: TargetFacts, target: str) -> None:
        """Write a head, which is one of `heads`, into a folder that exists; UserError if the layout cannot hold it.

        facts: of the target. target: what others call the target, such as a path or an id of a hub.
        """

    @abstractmethod
    def read(self, folder: Path, facts: TargetFacts) -> tuple[DraftHead, DraftNetwork]:
        """Head and network in float32 of a folder; UserError if it is damaged, or for another target than facts'."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty if it has none, UserError if it cannot be read."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pt file in float32; UserError if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
        return {name: tensor.float() for name, tensor in tensors.items()}
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a file of tensors: {str(error).splitlines()[0]}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically in bfloat16, as .safetensors or .pt."""
    # Copies, because neither format keeps two names of one tensor apart.
    stored = {name: tensor.detach().cpu().to(torch.bfloat16, copy=True) for name, tensor in tensors.items()}
    write = save_file if path.suffix == ".safetensors" else torch.save
    write_whole(path, lambda temporary: write(stored, temporary))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json atomically; it goes last, after the tensors."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(folder / CONFIG, lambda temporary: temporary.write_text(text))


def fill(network: DraftNetwork, tensors: Mapping[str, Tensor], folder: Path) -> DraftNetwork:
    """The network with these tensors; UserError if they are not those of it, by name and shape."""
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"head={folder} does not fit the target, or is damaged: {error}") from error
    return network.eval()


def check_full_vocabulary(network: DraftNetwork, layout: str) -> None:
    """UserError if the head does not draft all ids."""
    if len(network.vocabulary) < network.vocabulary.size:
        raise UserError(
            f"the head drafts {len(network.vocabulary)} of {network.vocabulary.size} ids: the layout {layout} holds "
            "heads of all ids only; train with draft_vocabulary=0"
        )
