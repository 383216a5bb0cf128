"""Names of a model's tensors in a checkpoint, which may differ from those of transformers' modules.

Checkpoints have other prefixes than the modules (a language model stored alone, or as a part of a multimodal model),
or names of an earlier version of the class, which transformers translates.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from hasten.accel.errors import UserError
from hasten.accel.models.adapter import Adapter
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.families import Family

# The number of the block in the name of one of its layers or tensors.
BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_IN_BLOCK = re.compile(r"[^.]+\.\d+\..+")


def is_outer(name: str) -> bool:
    """Whether a layer or tensor is outside the blocks, such as the output layer and the embedding."""
    return BLOCK_NUMBER.search(name) is None


def below_holder(name: str) -> str:
    """Name of a layer of a block from the list of blocks on, without the prefix before it: `layers.3.mlp.up_proj`."""
    found = _IN_BLOCK.search(name)
    assert found is not None, name
    return found[0]


class Names:
    """Logical names of the tensors of a model in a checkpoint; UserError where its blocks are not in it.

    blocks: prefix of the blocks' tensors, which a block's number follows.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, adapter: Adapter, family: Family, block: Iterable[str]):
        """block: paths of parameters in the first block."""
        self._checkpoint, self._adapter, self._family = checkpoint, adapter, family
        self._saved = saved_name(model)
        self._start = f"{adapter.blocks}."
        self._same = _same_parameters(model)
        # The form in which transformers saves names of the first block.
        self._saved_start = self._saved(f"{self._start}0.\0").removesuffix("0.\0")
        self.blocks = self._find_blocks(list(block))

    def local(self, path: str) -> str:
        """Name of a parameter of a block, below the block's prefix. path: in the block."""
        if self._family.experts is not None:
            return self._family.logical(path)
        saved = self._saved(f"{self._start}0.{path}")
        return saved.removeprefix(f"{self._saved_start}0.")

    def outer(self, path: str) -> str:
        """Name of a parameter outside the blocks. path: in the model."""
        candidates = [name for one in (path, *self._same.get(path, ())) for name in self._candidates(one)]
        return next((name for name in candidates if name in self._checkpoint), candidates[0])

    def head(self) -> str:
        """Name of the tensor that the output matrix is read from."""
        return self.outer(f"{self._adapter.head}.weight")

    def embedding(self) -> str:
        """Name of the tensor that the embedding is read from."""
        return self.outer(f"{self._adapter.embedding}.weight")

    def _candidates(self, path: str) -> list[str]:
        """Names that a parameter outside the blocks may have, the most likely first."""
        saved = self._saved(path)
        names = []
        # What is beside the blocks in the model is beside them in the checkpoint.
        for holder, stored in ((_holder(self._saved_start), saved), (_holder(self._start), path)):
            if stored.startswith(holder):
                names.append(_holder(self.blocks) + stored.removeprefix(holder))
        names += [saved, path]
        ends = [name for name in self._checkpoint.names if name.endswith(f".{path}")]
        return list(dict.fromkeys([*names, *(ends if len(ends) == 1 else [])]))

    def _find_blocks(self, block: list[str]) -> str:
        likely = list(dict.fromkeys([self._saved_start, self._start]))
        locals_ = [self.local(path) for path in block]
        for start in likely:
            if any(name.startswith(f"{start}0.") for name in self._checkpoint.names):
                return start
        # Any other prefix, below which a block has the model's tensors.
        some = locals_[0]
        starts = [
            name.removesuffix(f"0.{some}")
            for name in self._checkpoint.names
            if re.search(rf"(^|\.)0\.{re.escape(some)}$", name)
        ]
        starts = [start for start in starts if all(f"{start}0.{name}" in self._checkpoint for name in locals_)]
        if len(starts) == 1:
            return starts[0]
        where = f"{self._checkpoint.path}: its model_type has such blocks"
        if starts:
            raise UserError(f"tensors {likely[0]}0.* are missing from {where}, and several others match: {starts}")
        raise UserError(f"tensors {likely[0]}0.* are missing from {where}")


def _same_parameters(model: Any) -> dict[str, list[str]]:
    """By the path of a tied parameter, the paths of those that it is tied to: any of them may be stored."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    tied = [same for same in paths.values() if len(same) > 1]
    return {path: [other for other in same if other != path] for same in tied for path in same}


def saved_name(model: Any) -> Callable[[str], str]:
    """Function that translates names of a model's parameters into those that transformers saves.

    Tensors that transformers splits or joins when it saves them keep their names.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings
    except ImportError:  # before transformers 5.20
        return lambda name: name
    conversions = get_model_conversion_mapping(model, add_legacy=False)[::-1]
    reverse = [item.reverse_transform() for item in conversions if not isinstance(item, PrefixChange)]
    renamings = [item for item in reverse if isinstance(item, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


def _holder(start: str) -> str:
    """Prefix of the module that holds the list of blocks with this prefix."""
    return start.removesuffix(".").rpartition(".")[0] + "." if "." in start.removesuffix(".") else ""
