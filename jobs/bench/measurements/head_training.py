"""CPU seconds of steps that train a head, in our loop and in transformers' Trainer."""

from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer as TransformersTrainer
from transformers import TrainerCallback, TrainingArguments

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.data.recording import Recorder, record_texts
from hasten.accel.training.data.records import Records, RecordsMeta
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, HeadBatch, TargetFacts, TargetWeights
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.trainer import Trainer, TrainSettings
from hasten.jobs.common.tokenizer import load_tokenizer
from hasten.jobs.train.inputs import Reading

_SEQUENCES, _TOP, _LR = 16, 16, 1e-3
_MATRIX, _REPEATS = 1024, 5


class _Timed(TrainerCallback):
    """CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: object, **others: object) -> None:
        """Note the time."""
        self.ends.append(process_time())


class _Objective(nn.Module):
    """A head's loss as a model of transformers' Trainer; inputs are the fields of a batch."""

    def __init__(self, head: DraftHead, network: DraftNetwork) -> None:
        super().__init__()
        self.head, self.network = head, network

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The loss of the batch."""
        return {"loss": self.head.loss(self.network, HeadBatch(**inputs)).value}


class Loops:
    """Both loops on records of library text with the hidden states of these heads, which are made in `folder`."""

    def __init__(
        self,
        heads: Iterable[DraftHead],
        target: str,
        window: int,
        batch: int,
        steps: int,
        turns: int,
        seed: int,
        folder: Path,
    ) -> None:
        path = resolve(target)
        self._facts, self._weights = TargetFacts.of(path), TargetWeights.of(path)
        self._window, self._batch, self._steps, self._turns = window, batch, steps, turns
        self._seed, self._folder = seed, folder
        layers = tuple(dict.fromkeys(layer for head in heads for layer in head.layers(self._facts))) or (FINAL,)
        meta = RecordsMeta(layers, _TOP, self._facts.hidden_size, self._facts.fingerprint, "library")
        self._records = Records(folder / "records", meta)
        reading = Reading(load_tokenizer(path), self._facts.vocabulary, (), window, False, 0, seed)
        sequences = [(text.tokens, text.learned or []) for text in reading.library("train", _SEQUENCES)]
        target_model = load_target(path, torch.float32)
        self._records.write(0, list(record_texts(target_model, sequences, Recorder(layers, _TOP))))

    def measure(self, head: DraftHead, entries: int) -> dict[str, Any]:
        """Median CPU seconds of a step by loop, FLOPs of a step, and parameters; the first losses are compared."""
        windows = PackedWindows(self._records, head.layers(self._facts), self._window, self._seed)
        vocabulary = DraftVocabulary.most_frequent(windows.counts(self._facts.vocabulary), entries)
        seconds: dict[str, list[float]] = {"hasten": [], "transformers": []}
        first: dict[str, float] = {}
        for _ in range(self._turns):
            own, first["hasten"] = self._own(head, self._network(head, vocabulary), windows)
            peer, first["transformers"] = self._peer(head, self._network(head, vocabulary), windows)
            seconds["hasten"] += own
            seconds["transformers"] += peer
        if abs(first["hasten"] - first["transformers"]) > 1e-3 * abs(first["hasten"]):
            raise RuntimeError(f"the loops' first losses differ: {first}")
        network = self._network(head, vocabulary)
        counter = FlopCounterMode(display=False)
        with counter:
            self._trainer(head, network, windows).train(1)
        return {
            "seconds": {name: median(of) for name, of in seconds.items()},
            "flops": counter.get_total_flops(),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "first_loss": first["hasten"],
        }

    def _network(self, head: DraftHead, vocabulary: DraftVocabulary) -> DraftNetwork:
        torch.manual_seed(self._seed)
        network = head.build(self._facts, vocabulary)
        head.initialise(network, self._weights)
        network.attach(self._weights.embedding)
        return network

    def _trainer(self, head: DraftHead, network: DraftNetwork, windows: PackedWindows) -> Trainer:
        settings = TrainSettings(self._steps + 1, self._batch, self._batch, _LR, seed=self._seed)
        return Trainer(head, network, windows, settings)

    def _own(self, head: DraftHead, network: DraftNetwork, windows: PackedWindows) -> tuple[list[float], float]:
        """Seconds of each step behind the first one, and the first loss."""
        trainer = self._trainer(head, network, windows)
        first = trainer.train(1)[0]["loss"]
        ends = [process_time()]
        for _ in range(self._steps):
            trainer.train(1)
            ends.append(process_time())
        return _differences(ends), first

    def _peer(self, head: DraftHead, network: DraftNetwork, windows: PackedWindows) -> tuple[list[float], float]:
        """The same in transformers' Trainer."""
        order = [number for step in range(self._steps + 1) for number in windows.order(step, self._batch)]

        def collate(numbers: list[int]) -> dict[str, Tensor]:
            batch = windows.batch(numbers)
            tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
            return tensors | {"features": batch.features.float()}

        timed, losses = _Timed(), list[float]()
        arguments = TrainingArguments(
            output_dir=str(self._folder / "peer"),
            max_steps=self._steps + 1,
            per_device_train_batch_size=self._batch,
            learning_rate=_LR,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )

        class InOrder(TransformersTrainer):
            def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *others: Any, **more: Any) -> Tensor:
                loss: Tensor = model(**inputs)["loss"]
                losses.append(float(loss.detach()))
                return loss

        InOrder(
            model=_Objective(head, network),
            args=arguments,
            train_dataset=order,
            data_collator=collate,
            callbacks=[timed],
        ).train()
        return _differences(timed.ends), losses[0]


def matrix_rate() -> float:
    """FLOP/s of torch.mm in float32, in CPU time; the best of a few."""
    a, b = torch.randn(2, _MATRIX, _MATRIX)
    best = float("inf")
    for _ in range(_REPEATS):
        begun = process_time()
        torch.mm(a, b)
        best = min(best, process_time() - begun)
    return 2 * _MATRIX**3 / best


def _differences(ends: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(ends)]
