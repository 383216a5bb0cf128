"""What `hasten decode` and `hasten replay` read: models that belong together, prompts, and what a drafter learned."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from hasten.accel.compression.outputs.resumable import write_whole
from hasten.accel.data.library import library_files, library_root, read_texts
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.jobs.common.records import Record
from hasten.jobs.common.tokenizer import Tokenizer, load_tokenizer, vocabulary_size

# JSON can hold half of a pair of surrogates, which neither a tokenizer nor a file takes.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_LEARNED = ("drafter", "vocabulary")  # what a file of a drafter's memory says of itself
_LIBRARY_PROMPTS = 16
_LIBRARY_SHORTEST, _LIBRARY_LONGEST = 64, 128


@dataclass(frozen=True)
class Prompt:
    """A prompt's id as the file has it, and its token ids. where: what to call it in a message."""

    id: object
    tokens: list[int]
    where: str

    @property
    def key(self) -> str:
        """The id as text, which differs from that of every other prompt."""
        return str(self.id)


def model_folder(option: str, model: str) -> Path:
    """Absolute folder of a checkpoint; UserError names the option where there is none, or a broken one."""
    try:
        folder = resolve(model).absolute()
    except UserError as error:
        raise UserError(str(error).replace("model=", f"{option}=", 1)) from None
    Checkpoint(folder)
    return folder


def check_tokenizers(target: Path, draft: Path, reads_draft_probs: bool) -> None:
    """UserError where ids of the draft model mean something else to the target, with what differs.

    reads_draft_probs: whether the models' distributions are compared, which then must be of the same length.
    """
    tokenizers = [load_tokenizer(folder) for folder in (target, draft)]
    ids, other_ids = ({} if each is None else each.get_vocab() for each in tokenizers)
    right = "give a draft model with the target's tokenizer"
    if None not in tokenizers and ids != other_ids:
        differing = sorted(token for token in ids if other_ids.get(token) != ids[token])
        differing += sorted(token for token in other_ids if token not in ids)
        example = differing[0]
        named = ", ".join(
            f"{vocabulary[example]} in {name}" if example in vocabulary else f"missing in {name}"
            for name, vocabulary in (("target", ids), ("draft", other_ids))
        )
        raise UserError(
            f"target={target} and draft={draft} have different tokenizers: {len(ids)} and {len(other_ids)} entries, "
            f"{len(differing)} with another id, such as {example!r} ({named}); {right}"
        )
    sizes = vocabulary_size(target), vocabulary_size(draft)
    # Rows behind the tokenizer's last entry are padding, which models of one family have more or less of.
    if sizes[0] != sizes[1] and (reads_draft_probs or None in tokenizers):
        raise UserError(
            f"target={target} has a vocabulary of {sizes[0]} and draft={draft} one of {sizes[1]}: {right}"
            + ("" if None in tokenizers else ", or use verifier=sample_and_match")
        )


def draft_folder(draft: str | None, drafter: Drafter, target: Path, reads_draft_probs: bool) -> Path | None:
    """Folder of the draft model that a drafter needs, None where it needs none; UserError where it does not fit."""
    if not drafter.needs_draft_model:
        return None
    if draft is None:
        raise UserError(f"drafter={type(drafter).__name__} needs a draft model: give draft=PATH")
    folder = model_folder("draft", draft)
    check_tokenizers(target, folder, reads_draft_probs)
    return folder


def stop_ids(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end what a model writes: as its generation config says, else its config, else its tokenizer."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (end,)


def context_length(folder: Path) -> int | None:
    """Tokens that a model has positions for; None where it does not say."""
    found = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def read_prompts(
    path: Path, tokenizer: Tokenizer | None, vocabulary: int, prompt_field: str, id_field: str
) -> list[Prompt]:
    """Prompts of a JSON Lines file; UserError names the line that is wrong."""
    found: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, record in read_records("prompts", path):
        where = f"prompts={path}, line {number}"
        if prompt_field not in record:
            raise UserError(f"{where} has no {prompt_field!r}, only {', '.join(record)}: give prompt_field=NAME")
        tokens = _tokens(record[prompt_field], tokenizer, vocabulary, where, prompt_field)
        found.append(Prompt(record.get(id_field, number), tokens, where))
        earlier = lines.setdefault(found[-1].key, number)
        if earlier != number:
            raise UserError(f"prompts={path} has the id {found[-1].key!r} twice, in lines {earlier} and {number}")
    return found


def library_prompts(tokenizer: Tokenizer | None, vocabulary: int) -> list[Prompt]:
    """The beginnings of a few of the standard library's held-out files."""
    if tokenizer is None:
        raise UserError("prompts=null is text, and the target's folder has no tokenizer: give prompts of token ids")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found: list[Prompt] = []
    for name in library_files("held_out"):
        for text in read_texts(library_root(), [name]):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            step = (_LIBRARY_LONGEST - _LIBRARY_SHORTEST) // (_LIBRARY_PROMPTS - 1)
            tokens = [*([] if begin is None else [begin]), *ids][: _LIBRARY_SHORTEST + step * len(found)]
            if len(ids) >= 2 * _LIBRARY_LONGEST and max(tokens) < vocabulary:
                found.append(Prompt(name, tokens, name))
        if len(found) == _LIBRARY_PROMPTS:
            break
    return found


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None) -> None:
    """UserError names a prompt that does not fit the target's context with its completion; None has no limit."""
    for each in prompts:
        if limit is not None and len(each.tokens) + max_new_tokens > limit:
            raise UserError(
                f"{each.where}: the prompt {each.key!r} has {len(each.tokens)} tokens, and with max_new_tokens="
                f"{max_new_tokens} it is longer than the target's context of {limit}"
            )


def read_recorded(path: Path, vocabulary: int) -> list[tuple[list[int], int]]:
    """Sequences that `hasten decode` wrote: prompt and completion as ids, and the length of the prompt."""
    found: list[tuple[list[int], int]] = []
    for number, record in read_records("recorded", path):
        prompt, completion = record.get("prompt_token_ids"), record.get("token_ids")
        if not (prompt and _are_ids(prompt, vocabulary) and _are_ids(completion, vocabulary)):
            raise UserError(
                f"recorded={path}, line {number} has no prompt_token_ids and token_ids below {vocabulary}: "
                "give a file that hasten decode wrote with this target"
            )
        found.append((prompt + completion, len(prompt)))
    return found


def read_records(option: str, path: Path) -> Iterator[tuple[int, Record]]:
    """Number and object of every line that is not blank; UserError where one is no JSON object, or there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"{option}={path} cannot be read ({reason}): give a file of JSON Lines") from None
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{option}={path}, line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f'{option}={path}, line {number} is JSON, but no object such as {{"prompt": "text"}}')
        if "\\ud" in line.lower() and _HALF_CHARACTER.search(json.dumps(record, ensure_ascii=False)):
            raise UserError(
                f"{option}={path}, line {number} holds half a character (\\ud800 to \\udfff), which is no text"
            )
        yield number, record
    if empty:
        raise UserError(f"{option}={path} is empty: give JSON Lines, an object in each")


def prompt_seed(seed: int, key: str) -> int:
    """Seed of all that is drawn for a prompt, whatever prompts there are beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "big")


def load_learned(path: Path, drafter: Mapping[str, object], vocabulary: int) -> dict[str, Tensor]:
    """Tensors that an earlier run of the same drafter saved; none where there is no file yet.

    vocabulary: of the target, which must know the ids that were learned.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            note = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in _LEARNED}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"memory={path} cannot be read as what a drafter learned: {error}") from None
    made_by, known = (note.get(key) for key in _LEARNED)
    if made_by != drafter:
        raise UserError(f"memory={path} was learned by {_shown(made_by)}, and the drafter is {_shown(drafter)}")
    if known not in (None, vocabulary):
        raise UserError(
            f"memory={path} was learned from a target with a vocabulary of {known}, and this one has {vocabulary}: "
            "give another memory"
        )
    return tensors


def save_learned(path: Path, drafter: Mapping[str, object], vocabulary: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep what a drafter learned, whole or not at all."""
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = {"drafter": json.dumps(drafter, sort_keys=True), "vocabulary": json.dumps(vocabulary)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(kept, temporary, metadata=note))


def _tokens(prompt: object, tokenizer: Tokenizer | None, vocabulary: int, where: str, field: str) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError(f"{where} is text, and the target's folder has no tokenizer: give lists of token ids")
        prompt = tokenizer(prompt, verbose=False)["input_ids"]
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise UserError(f"{where} has a {field!r} that is neither text nor a list of token ids")
    if not prompt:
        raise UserError(f"{where} has an empty {field!r}: give one token at least")
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UserError(f"{where} holds token id {wrong}, outside the target's vocabulary (0 to {vocabulary - 1})")
    return prompt


def _are_ids(values: object, vocabulary: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < vocabulary for each in values)


def _shown(settings: Mapping[str, object] | None) -> str:
    if settings is None:
        return "nobody known"
    rest = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "_target_")
    return str(settings["_target_"]).rpartition(".")[2] + (f" ({rest})" if rest else "")
