"""The texts of a run: what calibration, search and evaluation read, how windows begin, and what a report says of it.

Search and evaluation take parts of the calibration's text by default, so that a search optimises for the user's text
and the report measures it. The parts share no token, whatever the seeds (accel/data/parts.py). An output records the
text that it was calibrated on, for later searches of a level database and evaluations of a checkpoint.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from hasten.accel.data.documents import LIBRARY
from hasten.accel.data.mixture import absolute
from hasten.accel.data.packing import unpack
from hasten.accel.data.parts import Part
from hasten.accel.data.tokens import Reading, Sample, calibration_part, fingerprint, load_sample
from hasten.accel.errors import UserError
from hasten.accel.evaluation.guessing import guessing_perplexity
from hasten.accel.evaluation.perplexity import Windows, load_windows
from hasten.accel.models import embedded
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import PROGRESS, ResumableFolder
from hasten.cluster.storage.naming import as_given
from hasten.cluster.storage.remote import is_uri
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Calibration, Evaluation, Sampled
from hasten.jobs.common.storage import copied
from hasten.jobs.common.tokenizer import (
    Tokenizer,
    begin_of,
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)

_LOG = logging.getLogger(__name__)
_RECORD = "calibration.json"


@dataclass(frozen=True)
class Origin:
    """The text of a calibration, which search and evaluation share by default.

    tenths: what the calibration takes. text: the report's entry on it, None if no method needed it.
    """

    source: str = LIBRARY
    tenths: int = Part("calibration").calibration
    text: Record | None = None

    def part(self, role: str) -> Part:
        """The part of the text for a role."""
        return Part(role, self.tenths)


class Texts:
    """Loads the texts of a run and notes what was loaded. folder: checkpoint whose tokenizer reads them.

    bos, template: the options of these names. origin: the text of the calibration that another run made, None for
    library; `calibrate` replaces it. cache: for a copy of that text. UserError for bos=true without such a token.
    """

    def __init__(
        self, folder: Path, bos: str, template: str | None, origin: Origin | None = None, cache: str | None = None
    ) -> None:
        self.tokenizer: Tokenizer | None = load_tokenizer(folder, template)
        self.vocabulary = vocabulary_size(folder)
        self.begin = begin_of(folder, self.tokenizer, bos)
        self.origin = origin or Origin()
        self._cache = cache
        self._loaded: dict[str, Record] = {}
        if self.origin.text is not None:
            self._loaded["calibration"] = self.origin.text

    def calibrate(self, calibration: Calibration, is_needed: bool) -> Tensor | None:
        """Calibration tokens (N, T), or packed ones; None if no method needs them. Their text becomes the origin."""
        source, size = calibration.source, (calibration.sequences, calibration.sequence_length)
        # Without tokens too: a method that needs none is measured on the same text as one that does.
        packed = calibration.packing == "documents"
        part = calibration_part(source, self.tokenizer, *size, self.begin, packed)
        self.origin = Origin(source, part.calibration)
        if not is_needed:
            return None
        tokens = self._draw("calibration", source, part, size, calibration.seed, packed)
        self._loaded["calibration"]["packing"] = calibration.packing
        self.origin = Origin(source, part.calibration, self._loaded["calibration"])
        return tokens

    def search(self, options: Sampled) -> Tensor:
        """Tokens (N, T) that candidates are compared on; by default the part of the calibration's text for a search."""
        source, part = self._chosen("search", options.source)
        return self._draw("search", source, part, (options.sequences, options.sequence_length), options.seed)

    def evaluate(self, options: Evaluation) -> Windows | None:
        """Windows of the evaluation, by default of a part of the calibration's text; None for no sequences."""
        if not options.sequences:
            return None
        source, part = self._chosen("evaluation", options.source)
        size = options.sequences, options.sequence_length
        windows = load_windows(
            source, self.tokenizer, *size, options.stride, vocabulary=self.vocabulary, part=part, begin=self.begin
        )
        self._note("evaluation", source, part, windows.scored, size, windows.fingerprint())
        targets = windows.tokens[windows.is_scored]
        self._loaded["evaluation"]["guessing_perplexity"] = guessing_perplexity(targets, self.vocabulary)
        return windows

    def report(self, original: Path | None) -> Record:
        """Keys of a report: each text, and identities of texts, original model and tokenizer. None is not known.

        `quantization` of the original says how it was quantized before this run, None for a plain checkpoint.

        original: checkpoint before compression. Metrics are comparable between reports in which the fingerprints of
        the original, the tokenizer and the text of the evaluation are equal.
        """
        # The text is hasten's own where the model is neither an embedded one nor made from one.
        is_foreign = original is None or not embedded.reference(original).startswith("embedded:")
        checkpoint = original and Checkpoint(original)
        texts = {
            role: text and text | {"is_own_text": text["source"] == LIBRARY and is_foreign}
            for role, text in ((role, self._loaded.get(role)) for role in ("calibration", "search", "evaluation"))
        }
        return {
            "texts": texts,
            "original": checkpoint
            and {
                "path": str(original),
                "fingerprint": checkpoint.fingerprint(),
                "quantization": checkpoint.quantization_title,
            },
            "tokenizer": {
                "fingerprint": tokenizer_fingerprint(self.tokenizer),
                "begin": list(self.begin),
                "template": template_fingerprint(self.tokenizer),
            },
        }

    def _chosen(self, role: str, source: str | None) -> tuple[str, Part | None]:
        """Source and part of a role; a source of its own is used as a whole."""
        if source is None:
            source = self.origin.source
            if is_uri(source):
                source = str(copied(f"{role}.source", source, self._cache))
            elif source.startswith("/") and not Path(source).is_file():
                raise UserError(
                    f"{role}.source=null is the text of the calibration, {source}, which does not exist any more: "
                    f"give {role}.source=FILE"
                )
            return source, self.origin.part(role)
        # The library's files for search and evaluation are never those of a calibration.
        return source, Part(role) if source == LIBRARY else None

    def _draw(
        self, role: str, source: str, part: Part | None, size: tuple[int, int], seed: int, packed: bool = False
    ) -> Tensor:
        """Tokens (N, T) of a text, or packed ones, of which it takes note. size: N and T."""
        sample: Sample = load_sample(
            source,
            self.tokenizer,
            *size,
            seed=seed,
            vocabulary=self.vocabulary,
            part=part,
            begin=self.begin,
            packed=packed,
        )
        count = unpack(sample.tokens)[0].numel()
        self._note(role, source, part, count, size, fingerprint(sample.tokens))
        self._loaded[role]["sources"] = [_described(reading, count) for reading in sample.readings]
        return sample.tokens

    def _note(
        self, role: str, source: str, part: Part | None, tokens: int, size: tuple[int, int], identity: str
    ) -> None:
        names = [] if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(list(self.begin))
        self._loaded[role] = {
            "source": absolute(source),
            "part": None if part is None else part.role,
            "tenths": None if part is None or source == LIBRARY else list(part.tenths),
            "tokens": tokens,
            "sequences": size[0],
            "sequence_length": size[1],
            "begin": list(self.begin),
            "begin_text": "".join(map(str, names)),
            "fingerprint": identity,
        }


def record_origin(output: ResumableFolder, origin: Origin) -> None:
    """Record in an output that is open which text it was calibrated on."""
    content = asdict(origin) | {"source": absolute(origin.source)}
    output.write_json(output.path / PROGRESS / _RECORD, as_given(content))


def recorded_origin(output: Path) -> Origin | None:
    """Text that a level database or checkpoint was calibrated on; None where none is recorded."""
    file = output / PROGRESS / _RECORD
    return Origin(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _described(reading: Reading, tokens: int) -> Record:
    """The report's entry on a source, of so many tokens of all sources together."""
    return {
        "source": absolute(reading.source),
        "weight": reading.weight,
        "share": reading.tokens / tokens,
        "tokens": reading.tokens,
        "sequences": reading.sequences,
        "documents": reading.documents,
    }


def print_texts(report: Mapping[str, Record]) -> None:
    """Print a line that names each text, and one on texts that are hasten's own, for a model that is not embedded."""
    texts = {role: text for role, text in report["texts"].items() if text}
    if not texts:
        return
    tokens: dict[str, list[str]] = {}
    for role, text in texts.items():
        tokens.setdefault(as_given(text["source"]), []).append(f"{text['tokens']} tokens for {role}")
    begin = next(iter(texts.values()))["begin_text"]
    words = [f"{source}, {' and '.join(amounts)}" for source, amounts in tokens.items()]
    mixed = [text["sources"] for text in texts.values() if len(text.get("sources") or ()) > 1]
    print(f"text: {'; '.join(words)}" + (f"; windows begin with {begin}" if begin else ""))
    for source in mixed[0] if mixed else ():
        print(f"  {source['share']:.1%} of {as_given(source['source'])}, drawn from {_documents(source)}")
    own = [role for role, text in texts.items() if text["is_own_text"]]
    if own:
        # The other texts follow that of the calibration.
        options = ["calibration"] if "calibration" in own else own
        print(
            f"note: the text of {' and '.join(own)} is hasten's own, the source code of Python's standard library: "
            f"give {' '.join(f'{role}.source=FILE' for role in options)} with text as the model's users write it"
        )


def _documents(source: Record) -> str:
    count = source["documents"]
    return "token ids" if count is None else "1 document" if count == 1 else f"{count} documents"
