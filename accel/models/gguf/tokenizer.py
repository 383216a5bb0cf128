"""A tokenizer as a GGUF file describes it: its entries, the merges, and llama.cpp's name of how it splits text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.accel.data.begin import begin_tokens
from hasten.accel.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Types of entries.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# llama.cpp's names by the steps of a tokenizer.json; those that split by one expression are transformers' table.
_BY_STEPS: dict[tuple[tuple[object, object], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
}
_PREFERRED = ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
_SCORELESS = -1e6


def splitter_of(folder: Path) -> str | None:
    """llama.cpp's name of how a folder's tokenizer splits text; None where it does not split, or has no tokenizer.

    UserError where there is no name, or where the tokenizer is of a kind that GGUF files do not describe.
    """
    described = _described(folder)
    if described is None or _is_sentencepiece(described):
        return None
    if described["model"]["type"] != "BPE":
        raise UserError(f"format=gguf cannot write a tokenizer of the type {described['model']['type']}: expected BPE")
    steps = described.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    name = _BY_STEPS.get(tuple(_step(step) for step in steps))
    splits = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if name is None and len(splits) == 1:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as KNOWN

        name = next((known for known in _PREFERRED if KNOWN.get(known) == splits[0]), None)
    if name is None:
        raise UserError(
            f"the tokenizer in {folder} splits text in a way that llama.cpp may have no name for: "
            "give its name as gguf.pre_tokenizer, such as llama-bpe"
        )
    return name


def add_tokenizer(writer: "GGUFWriter", folder: Path, size: int, splitter: str | None) -> None:
    """Write the tokenizer of a checkpoint folder. size: rows of the embedding. splitter: see splitter_of."""
    described = _described(folder)
    if described is None:
        writer.add_tokenizer_model("no_vocab")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary: dict[str, int] = described["model"]["vocab"]
    added = {entry["id"]: entry for entry in described.get("added_tokens", ())}
    names = {number: text for text, number in vocabulary.items()} | {
        number: entry["content"] for number, entry in added.items()
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"].get("merges", ())]
    sentencepiece = _is_sentencepiece(described)
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    types = [_type(number, names, added, described["model"].get("unk_token"), sentencepiece) for number in range(size)]
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    if splitter is not None:
        writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    if sentencepiece:
        # A merge's rank stands for the score of its entry: llama.cpp merges by the highest score.
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge.split(" ")), rank)
        writer.add_token_scores([-float(ranks[text]) if text in ranks else _SCORELESS for text in tokens])
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(int(number))
    begin = begin_tokens(tokenizer)
    writer.add_add_bos_token(bool(begin) and begin[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def restore(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Give a tokenizer that transformers made from a GGUF file what transformers leaves out.

    These are the steps of a splitter that it does not know, the roles of special tokens, the token that begins a text,
    and the template of chats.
    """
    from tokenizers import pre_tokenizers, processors

    backend, tokens = tokenizer.backend_tokenizer, metadata["tokenizer.ggml.tokens"]
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, f"{role}_token", tokens[number])
    if metadata.get("tokenizer.ggml.add_bos_token") and not begin_tokens(tokenizer):
        begin = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    if metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = metadata["tokenizer.chat_template"]


def _described(folder: Path) -> dict[str, Any] | None:
    file = folder / "tokenizer.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _is_sentencepiece(described: Mapping[str, Any]) -> bool:
    return bool(described["model"].get("byte_fallback"))


def _step(step: Mapping[str, Any]) -> tuple[str | None, object]:
    setting = {"ByteLevel": "use_regex", "Digits": "individual_digits"}.get(str(step.get("type")), "")
    return step.get("type"), step.get(setting, True)


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that it does not have."""
    parts = [part for part in (described.get("normalizer"), described.get("pre_tokenizer")) if part]
    steps = [step for part in parts for step in part.get("normalizers") or part.get("pretokenizers") or [part]]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _type(
    number: int, names: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, sentencepiece: bool
) -> int:
    if number not in names:
        return _UNUSED
    if sentencepiece and names[number] == unknown:
        return _UNKNOWN
    if number in added:
        return _CONTROL if added[number]["special"] else _USER
    name = names[number]
    is_byte = sentencepiece and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
    return _BYTE if is_byte else _NORMAL
