"""Records the target on the sequences of `hasten train`, shard by shard; a killed recording resumes with a shard."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from hasten.accel.decoding.engine import Request
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import Target
from hasten.accel.errors import UserError
from hasten.accel.training.data.recording import Recorder, record_answers, record_texts
from hasten.accel.training.data.records import META, Record, Records, RecordsMeta, shard_path
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import prompt_seed
from hasten.jobs.train.inputs import TrainingText

_LOG = logging.getLogger(__name__)


class Recording:
    """The records of sequences in a folder. meta: what they hold; UserError if the folder holds something else.

    A folder that holds more hidden states of the same target on the same sequences is used as it is.
    """

    def __init__(
        self, folder: Path, meta: RecordsMeta, texts: Sequence[TrainingText], shard: int, max_new_tokens: int
    ) -> None:
        self._texts, self._shard, self._max_new_tokens = texts, shard, max_new_tokens
        if (folder / META).is_file():
            held = Records(folder).meta
            for name in ("target", "source", "top", "hidden_size"):
                if getattr(held, name) != getattr(meta, name):
                    raise UserError(
                        f"{folder} holds records of another {name}: {getattr(held, name)} against "
                        f"{getattr(meta, name)}; give another data.records"
                    )
            if set(meta.layers) <= set(held.layers):
                meta = held
        self._meta, self._folder = meta, folder

    @property
    def bytes(self) -> int:
        """Bytes of all shards, at most."""
        tokens = sum(len(text.tokens) + (text.learned is None) * self._max_new_tokens for text in self._texts)
        return tokens * self._meta.bytes_per_token()

    def missing(self) -> list[int]:
        """Shards that are not recorded yet."""
        count = -(-len(self._texts) // self._shard)
        return [number for number in range(count) if not shard_path(self._folder, number).is_file()]

    def check_space(self) -> None:
        """UserError if the disk has no room for the missing shards; the size is logged."""
        missing = self.missing()
        if not missing:
            return
        needed = self.bytes * len(missing) * self._shard // max(1, len(self._texts))
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"records of {needed / 1e9:.2f} GB do not fit {existing}, which has {free / 1e9:.2f} GB free: give "
                "another data.records, or fewer data.sequences"
            )
        _LOG.info("recording at most %.1f MB in %s", needed / 1e6, self._folder)

    def run(
        self, load: Callable[[], Target], title: str, stop: Sequence[int], sampling: Sampling, seed: int, in_flight: int
    ) -> Records:
        """Record what is missing; returns all records. load: the target, called once if anything is missing."""
        records, missing = Records(self._folder, self._meta), self.missing()
        if not missing:
            return records
        target, recorder = load(), Recorder(self._meta.layers, self._meta.top)
        with Progress(title, len(self._texts), "sequence") as progress:
            for number in missing:
                first = number * self._shard
                part = self._texts[first : first + self._shard]
                made: dict[int, Record] = {}
                given = [index for index, text in enumerate(part) if text.learned is not None]
                sequences = [(part[index].tokens, part[index].learned or []) for index in given]
                if given:
                    made |= dict(zip(given, record_texts(target, sequences, recorder), strict=True))
                requests = [
                    Request(
                        str(index),
                        text.tokens,
                        self._max_new_tokens,
                        sampling,
                        prompt_seed(seed, str(first + index)),
                    )
                    for index, text in enumerate(part)
                    if text.learned is None
                ]
                if requests:
                    answers = record_answers(target, requests, recorder, stop, in_flight)
                    made |= {int(name): record for name, record in answers}
                records.write(number, [made[index] for index in sorted(made)])
                progress.update(min(first + self._shard, len(self._texts)))
        return records
