"""The interface of a head: a small network on the hidden states of a model, which a drafter reads.

A head is a frozen dataclass of the hyper-parameters of its network and of its training. It says how examples are made,
what is minimised, how good the result is on held-out text, and how the network is stored. A new head is a module with
its network and its training, and a file in conf/head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ExamplesT = TypeVar("ExamplesT", bound=Sized)
NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class HeadModels:
    """Causal LMs of one vocabulary on one device. draft: None where the head needs none."""

    target: PreTrainedModel
    draft: PreTrainedModel | None = None


class HeadQuality(ABC):
    """What a trained head is worth on examples that it was not trained on."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers by name; `loss` is the objective of the training."""

    def tables(self) -> Mapping[str, Sequence[Mapping[str, float]]]:
        """Rows of tables by name; they go into the report as they are."""
        return {}

    @abstractmethod
    def summary(self) -> list[str]:
        """Lines of text for a reader."""


class Head(ABC, Generic[ExamplesT, NetworkT]):
    """A head and its training.

    drafter: name in conf/drafter of the drafter that reads the head; its hyper-parameter `head` is the file's path.
    file: usual name of the file. needs_draft_model: examples are made with the draft model, else with the target
    alone. reads: the model whose hidden states the network reads; a file is for this model alone. epochs: passes over
    all examples.
    """

    drafter: ClassVar[str]
    file: ClassVar[str]
    needs_draft_model: ClassVar[bool] = True
    reads: ClassVar[Literal["target", "draft"]] = "draft"
    epochs: int

    @abstractmethod
    def parameters(self, hidden_size: int) -> int:
        """Parameters of the network for a model of this width."""

    @property
    def examples_per_token(self) -> float:
        """Share of the tokens of a text that become examples."""
        return 1.0

    @abstractmethod
    def collect(
        self,
        models: HeadModels,
        tokens: Tensor,
        generator: torch.Generator,
        batch: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ExamplesT:
        """Examples, in the CPU's memory, from windows tokens (S, T) int64.

        The generator is on the device of the models. batch: windows that run at once. progress: called with the number
        of windows that are done.
        """

    @abstractmethod
    def steps(self, examples: int) -> int:
        """Steps of the whole training on this number of examples."""

    @abstractmethod
    def fit(
        self,
        examples: ExamplesT,
        seed: int = 0,
        device: str = "cpu",
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> NetworkT:
        """The trained network, in float32, on the CPU; report(step, loss) is called after every step, from step 1."""

    @abstractmethod
    def measure(self, network: NetworkT, examples: ExamplesT) -> HeadQuality:
        """Quality on examples that the network was not trained on."""

    @abstractmethod
    def save(self, network: NetworkT, path: Path, fingerprint: str = "") -> None:
        """Write the file, whole or not at all. fingerprint: of the checkpoint that `reads` names; empty is unknown."""

    @abstractmethod
    def load(self, path: Path, fingerprint: str = "") -> NetworkT:
        """The network of a file, in float32; UserError where it is none, or is for a model of another fingerprint."""
