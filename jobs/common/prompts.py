"""Inputs of `hasten decode` and `hasten replay`: compatible models, prompts, and a drafter's learned state."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.prompt.base import Drafting, saved_positions
from hasten.accel.data.begin import begin_tokens, separator_tokens
from hasten.accel.data.chat import encode_conversation, encode_prompt
from hasten.accel.data.library import library_files, library_root, read_texts
from hasten.accel.data.records import Conversation, check_characters, read_prompt
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.resumable import write_whole
from hasten.jobs.common.records import Record
from hasten.jobs.common.tokenizer import Tokenizer, load_tokenizer, vocabulary_size

_LEARNED = ("drafter", "vocabulary")  # metadata in a file of learned state
_LIBRARY_PROMPTS = 16
_LIBRARY_SHORTEST, _LIBRARY_LONGEST = 64, 128


@dataclass(frozen=True)
class Prompt:
    """A prompt. id: as in the file. where: file and line, for messages. is_chat: made by a chat template.

    contexts: see hasten.accel.decoding.engine.Request.
    """

    id: object
    tokens: list[int]
    where: str
    is_chat: bool = False
    contexts: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The id as text, unique among the prompts."""
        return str(self.id)


def model_folder(option: str, model: str) -> Path:
    """Absolute folder of a checkpoint; UserError names the option if it is missing or damaged."""
    try:
        folder = resolve(model).absolute()
    except UserError as error:
        raise UserError(str(error).replace("model=", f"{option}=", 1)) from None
    Checkpoint(folder)
    return folder


def check_tokenizers(target: Path, draft: Path) -> None:
    """UserError if the models' tokenizers differ, with an example; without tokenizers, if the vocabularies do."""
    tokenizers = [load_tokenizer(folder) for folder in (target, draft)]
    ids, other_ids = ({} if tokenizer is None else tokenizer.get_vocab() for tokenizer in tokenizers)
    remedy = "give a draft model with the target's tokenizer"
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
            f"{len(differing)} with another id, such as {example!r} ({named}); {remedy}"
        )
    sizes = vocabulary_size(target), vocabulary_size(draft)
    # Vocabulary rows beyond the tokenizer's entries are padding, whose size differs within a model family.
    if sizes[0] != sizes[1] and None in tokenizers:
        raise UserError(f"target={target} has a vocabulary of {sizes[0]} and draft={draft} one of {sizes[1]}: {remedy}")


def draft_folder(draft: str | None, drafter: Drafter, target: Path) -> Path | None:
    """Folder of the draft model, None if the drafter needs none; UserError if it does not fit the target."""
    if not drafter.needs_draft_model:
        return None
    if draft is None:
        raise UserError(f"drafter={type(drafter).__name__} needs a draft model: give draft=PATH")
    folder = model_folder("draft", draft)
    check_tokenizers(target, folder)
    return folder


def with_draft(method: CacheMethod, target: Path) -> CacheMethod:
    """A cache method with the absolute folder of its draft model; UserError where this does not fit the target."""
    if not isinstance(method, Drafting) or method.draft is None:
        return method
    folder = model_folder("cache.draft", method.draft)
    check_tokenizers(target, folder)
    return replace(method, draft=str(folder))


def stop_ids(folder: Path, tokenizer: Tokenizer | None) -> dict[int, str]:
    """Token ids that end every completion, each with the place that names it.

    They are those of the model's generation config, else of its config, and the tokenizer's own.
    """
    places: dict[int, str] = {}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            places |= dict.fromkeys(ids if isinstance(ids, list) else [ids], name)
            break
    end = getattr(tokenizer, "eos_token_id", None)
    return places if end is None else {end: "the tokenizer", **places}


def context_length(folder: Path) -> int | None:
    """Maximum context of a model in tokens; None if its config does not state one."""
    positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def read_prompts(
    path: Path,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    prompt_field: str,
    id_field: str,
    special_tokens: bool = False,
    contexts: bool = False,
) -> list[Prompt]:
    """Prompts of a JSON Lines file; UserError names the wrong line. For the records see hasten.accel.data.records.

    special_tokens: whether names of special tokens in plain prompts are those tokens. contexts: whether each line has
    contexts, too, and maybe a prefix, which stands before them.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, record in read_records("prompts", path):
        where = f"prompts={path}, line {number}"
        prompt = read_prompt(record, where, prompt_field)
        is_chat = False
        if isinstance(prompt, list):
            tokens = prompt
        elif tokenizer is None:
            raise UserError(f"{where} is text, and the target's folder has no tokenizer: give lists of token ids")
        else:
            tokens, is_chat = encoded_prompt(prompt, tokenizer, where, special_tokens)
        _check_tokens(tokens, vocabulary, where, prompt_field)
        bounds: tuple[int, ...] = ()
        if contexts:
            if is_chat:
                raise UserError(f"{where} is a conversation, which has no contexts: give text or token ids")
            parts = _context_parts(record, tokenizer, where, special_tokens)
            for part in parts:
                _check_tokens(part or [0], vocabulary, where, "contexts")
            tokens, bounds = _joined(parts, tokens, () if tokenizer is None else begin_tokens(tokenizer))
        prompts.append(Prompt(record.get(id_field, number), tokens, where, is_chat, bounds))
        earlier = lines.setdefault(prompts[-1].key, number)
        if earlier != number:
            raise UserError(f"prompts={path} has the id {prompts[-1].key!r} twice, in lines {earlier} and {number}")
    return prompts


def _context_parts(record: Record, tokenizer: Tokenizer | None, where: str, special_tokens: bool) -> list[list[int]]:
    """Token ids of the prefix, which may be none, and of each context."""
    contexts, prefix = record.get("contexts"), record.get("prefix", [])
    if not isinstance(contexts, list) or not contexts:
        raise UserError(f"{where} has no list of 'contexts' beside the prompt, which this cache reads: give texts")
    parts = []
    for name, part in (("prefix", prefix), *(("contexts", context) for context in contexts)):
        if isinstance(part, list) and all(type(token) is int for token in part):
            ids = part
        elif isinstance(part, str) and tokenizer is not None:
            ids, _ = encoded_prompt(part, tokenizer, where, special_tokens)
        else:
            raise UserError(f"{where} has {name!r} of something else than text or token ids")
        if name == "contexts" and not ids:
            raise UserError(f"{where} has an empty context: leave it out")
        parts.append(ids)
    return parts


def _joined(parts: list[list[int]], prompt: list[int], begin: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """All tokens, and where contexts begin and the last one ends. begin: ids of every text; the whole has them once."""

    def bare(ids: list[int]) -> list[int]:
        return ids[len(begin) :] if begin and tuple(ids[: len(begin)]) == begin else ids

    prefix, *contexts = parts
    tokens, bounds = [*begin, *bare(prefix)], list[int]()
    for context in contexts:
        bounds.append(len(tokens))
        tokens += bare(context)
    return [*tokens, *bare(prompt)], (*bounds, len(tokens))


def encoded_prompt(
    prompt: Conversation | str, tokenizer: Tokenizer, where: str, special_tokens: bool
) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether a chat template made them."""
    if isinstance(prompt, Conversation):
        encoded = encode_conversation(tokenizer, prompt, where, prompt=True)
        if not isinstance(encoded, str):
            return encoded, True
        prompt = encoded
    try:
        return encode_prompt(tokenizer, prompt, special_tokens), False
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def library_prompts(tokenizer: Tokenizer | None, vocabulary: int) -> list[Prompt]:
    """Prompts from the beginnings of held-out files of the standard library."""
    if tokenizer is None:
        raise UserError("prompts=null is text, and the target's folder has no tokenizer: give prompts of token ids")
    begin = separator_tokens(tokenizer)
    prompts: list[Prompt] = []
    for name in library_files("held_out"):
        for text in read_texts(library_root(), [name]):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            step = (_LIBRARY_LONGEST - _LIBRARY_SHORTEST) // (_LIBRARY_PROMPTS - 1)
            tokens = [*begin, *ids][: _LIBRARY_SHORTEST + step * len(prompts)]
            if len(ids) >= 2 * _LIBRARY_LONGEST and max(tokens) < vocabulary:
                prompts.append(Prompt(name, tokens, name))
        if len(prompts) == _LIBRARY_PROMPTS:
            break
    return prompts


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None) -> None:
    """UserError names a prompt that exceeds the target's context with its completion; limit=None is no limit."""
    for prompt in prompts:
        positions = len(prompt.tokens) - saved_positions(prompt.contexts)
        if limit is not None and positions + max_new_tokens > limit:
            raise UserError(
                f"{prompt.where}: the prompt {prompt.key!r} has {positions} tokens, and with max_new_tokens="
                f"{max_new_tokens} it is longer than the target's context of {limit}"
            )


def read_recorded(path: Path, vocabulary: int) -> list[tuple[list[int], int]]:
    """Sequences that `hasten decode` wrote: token ids of prompt and completion, and the prompt's length."""
    sequences: list[tuple[list[int], int]] = []
    for number, record in read_records("recorded", path):
        prompt, completion = record.get("prompt_token_ids"), record.get("token_ids")
        if not (prompt and _are_ids(prompt, vocabulary) and _are_ids(completion, vocabulary)):
            raise UserError(
                f"recorded={path}, line {number} has no prompt_token_ids and token_ids below {vocabulary}: "
                "give a file that hasten decode wrote with this target"
            )
        sequences.append((prompt + completion, len(prompt)))
    return sequences


def read_records(option: str, path: Path) -> Iterator[tuple[int, Record]]:
    """Number and object of every line that is not blank; UserError if one is not a JSON object, or if all are blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
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
        check_characters(line, record, f"{option}={path}, line {number}")
        yield number, record
    if empty:
        raise UserError(f"{option}={path} is empty: give JSON Lines, an object in each")


def prompt_seed(seed: int, key: str) -> int:
    """Seed for sampling a prompt's completion, independent of the other prompts."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "big")


def load_learned(path: Path, drafter: Mapping[str, object], vocabulary: int) -> dict[str, Tensor]:
    """Tensors that an earlier run of the same drafter saved; empty if the file does not exist.

    vocabulary: the target's size, which must equal the saved one.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            note = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in _LEARNED}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"memory={path} cannot be read as a drafter's learned state: {error}") from None
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
    """Save a drafter's learned state; the file is replaced atomically."""
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = {"drafter": json.dumps(drafter, sort_keys=True), "vocabulary": json.dumps(vocabulary)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(kept, temporary, metadata=note))


def _check_tokens(tokens: Sequence[int], vocabulary: int, where: str, field: str) -> None:
    if not tokens:
        raise UserError(f"{where} has an empty {field!r}: give one token at least")
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UserError(f"{where} holds token id {wrong}, outside the target's vocabulary (0 to {vocabulary - 1})")


def _are_ids(values: object, vocabulary: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < vocabulary for value in values)


def _shown(settings: Mapping[str, object] | None) -> str:
    if settings is None:
        return "nobody known"
    settings_text = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "_target_")
    return str(settings["_target_"]).rpartition(".")[2] + (f" ({settings_text})" if settings_text else "")
