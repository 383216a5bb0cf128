"""What a training of a head is made of, so that any process can build the same network and read the same batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.drafters.heads.base import HeadMemory
from hasten.accel.errors import UserError
from hasten.accel.training.acceptance import HeldOut, deployed, measured, rates_of
from hasten.accel.training.data.records import Records
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.heads.draft_head import (
    DraftHead,
    DraftNetwork,
    TargetFacts,
    TargetWeights,
    adopt_weights,
    load_head,
)
from hasten.accel.training.heads.stored import BFLOAT16
from hasten.accel.training.heads.vocabulary import DraftVocabulary

SCORE = "mean_acceptance_length"


@dataclass(frozen=True)
class HeadSetup:
    """A head, its target and its records.

    target: folder of the checkpoint. records, held_records: folders of records, to train and to measure on. window:
    tokens of a window. entries: ids of the draft's vocabulary; 0 is all. least_prompt: tokens of a held-out sequence
    that are its prompt, at least. budget: drafted tokens of a pass when acceptance is measured. store: see `to_stored`.
    initial: folder of a trained head that the training begins with; None begins anew.
    """

    head: DraftHead
    drafter: Drafter
    target: Path
    facts: TargetFacts
    records: Path
    held_records: Path
    window: int
    entries: int
    least_prompt: int
    budget: int
    seed: int
    store: str = BFLOAT16
    initial: Path | None = None

    def windows(self) -> PackedWindows:
        """Windows to train on; UserError if the records have nothing to learn."""
        return PackedWindows(Records(self.records), self.head.layers(self.facts), self.window, self.seed)

    def vocabulary(self, windows: PackedWindows) -> DraftVocabulary:
        """The most frequent ids of the windows."""
        return DraftVocabulary.most_frequent(windows.counts(self.facts.vocabulary), self.entries)

    def network(self, vocabulary: DraftVocabulary, weights: TargetWeights, device: torch.device) -> DraftNetwork:
        """The network as the training begins, the same in every process."""
        torch.manual_seed(self.seed)
        network = self.head.build(self.facts, vocabulary)
        self.head.initialise(network, weights)
        if self.initial is not None:
            self._adopt(network, self.initial)
        network.attach(weights.embedding.to(device))
        network.to(device)
        # That of the network: a draft model has all ids, whatever the option says.
        network.vocabulary = network.vocabulary.to(device)
        return network

    def _adopt(self, network: DraftNetwork, folder: Path) -> None:
        _, trained, _ = load_head(folder, type(self.head), self.facts)
        try:
            adopt_weights(network, trained)
        except ValueError as error:
            raise UserError(f"initial={folder} has other sizes than the head to train: {error}") from error

    def held_out(self) -> HeldOut:
        """The records to measure on; UserError if nothing is left behind their prompts."""
        records, layers = Records(self.held_records), self.head.layers(self.facts)
        sequences = [record for path in records.shards() for record in records.read(path, layers)]
        held_out = HeldOut.of(sequences, self.least_prompt)
        if not held_out.tokens:
            raise UserError("held_out holds no token behind its prompts: give longer texts, or a shorter prompt")
        return held_out


class Measurement:
    """Measures weights of a network on the held-out records. embedding: the target's, on the device that computes."""

    def __init__(self, setup: HeadSetup, vocabulary: DraftVocabulary, embedding: Tensor, network: DraftNetwork) -> None:
        self._setup, self._vocabulary, self._embedding, self._network = setup, vocabulary, embedding, network
        self.held_out = setup.held_out()

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Mean acceptance length, and acceptance by position, of the drafter with these weights."""
        setup = self._setup
        stats = measured(setup.head, setup.drafter, self._deployed(weights), self.held_out, setup.budget)
        return {SCORE: stats.metrics()[SCORE], "acceptance_per_position": stats.acceptance_per_position}

    def rates(self, weights: dict[str, Tensor]) -> list[list[float]]:
        """Acceptance by depth and rank, see `rates_of`."""
        return rates_of(self._setup.head, self._deployed(weights), self.held_out)

    def _deployed(self, weights: dict[str, Tensor]) -> HeadMemory:
        setup = self._setup
        return deployed(setup.head, weights, setup.facts, self._vocabulary, self._embedding, self._network, setup.store)
