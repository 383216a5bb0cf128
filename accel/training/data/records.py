"""Records of a target: sequences with its hidden states and most probable next tokens, in a folder of shards.

A shard is one safetensors file of whole sequences, one after the other, written atomically; `records.json` says what
all shards have in common. So recording goes on after a crash with the next shard.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole

META = "records.json"
_SHARD = "records-{:05d}.safetensors"


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard."""
    return folder / _SHARD.format(number)


@dataclass(frozen=True)
class Record:
    """A sequence of T tokens. learned: (T,) bool, tokens that a head is to learn to predict, such as an answer's.

    tokens: (T,) int64. features: (T, F * D) bfloat16. top_ids (T, K) int32, top_log_probs (T, K) float16: the target's
    most probable ids after each token, with their log probabilities among all ids; of the last token of an answer, and
    of a prompt's tokens except the last, they may be missing: then top_log_probs is -inf.
    """

    tokens: Tensor
    learned: Tensor
    features: Tensor
    top_ids: Tensor
    top_log_probs: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RecordsMeta:
    """What all records of a folder have in common.

    layers: see `Target.feature_layers`. top: K. hidden_size: D. target: fingerprint of its checkpoint. source: anything
    that identifies the texts.
    """

    layers: tuple[int, ...]
    top: int
    hidden_size: int
    target: str
    source: str = ""

    def bytes_per_token(self) -> int:
        """Bytes of a token in a shard."""
        return 2 * len(self.layers) * self.hidden_size + 6 * self.top + 9


class Records:
    """A folder of records. meta: what a new folder is to hold; None opens one that exists.

    UserError if the folder holds records of something else, or none where they are expected.
    """

    def __init__(self, folder: Path, meta: RecordsMeta | None = None) -> None:
        self.folder = folder
        path = folder / META
        if path.is_file():
            held = json.loads(path.read_text())
            self.meta = RecordsMeta(**{**held, "layers": tuple(held["layers"])})
            if meta is not None and meta != self.meta:
                own, other = asdict(self.meta), asdict(meta)
                differing = [name for name in own if own[name] != other[name]]
                raise UserError(
                    f"{folder} holds records of something else: {', '.join(differing)} differ; give a new folder"
                )
        elif meta is None:
            raise UserError(f"{folder} holds no records of a target: {META} is missing")
        else:
            self.meta = meta
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(meta), indent=2) + "\n"
            write_whole(path, lambda temporary: Path(temporary).write_text(text))

    def shards(self) -> list[Path]:
        """Shards that are complete, in order; there may be gaps while several processes record."""
        return sorted(self.folder.glob(_SHARD.replace("{:05d}", "*")))

    def write(self, number: int, records: Sequence[Record]) -> None:
        """Write a shard atomically."""
        tensors = {name: torch.cat([getattr(record, name) for record in records]) for name in Record.__annotations__}
        tensors["lengths"] = torch.tensor([len(record) for record in records])
        write_whole(shard_path(self.folder, number), lambda temporary: save_file(tensors, temporary))

    def read(self, path: Path, layers: Sequence[int] | None = None) -> list[Record]:
        """The sequences of a shard, with features of these layers only; None gives all. UserError if it is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and record it again") from error
        tensors["features"] = self.select(tensors["features"], layers)
        lengths = tensors.pop("lengths").tolist()
        parts = {name: tensor.split(lengths) for name, tensor in tensors.items()}
        return [Record(**{name: parts[name][index] for name in parts}) for index in range(len(lengths))]

    def select(self, features: Tensor, layers: Sequence[int] | None) -> Tensor:
        """Features (T, F' * D) of these layers; UserError for a layer that was not recorded."""
        if layers is None or tuple(layers) == self.meta.layers:
            return features
        missing = sorted(set(layers) - set(self.meta.layers))
        if missing:
            raise UserError(
                f"the records in {self.folder} have the hidden states {list(self.meta.layers)}, and the head reads "
                f"{list(layers)}: record the target again"
            )
        parts = features.unflatten(-1, (len(self.meta.layers), self.meta.hidden_size))
        return parts[:, [self.meta.layers.index(layer) for layer in layers]].flatten(1)
