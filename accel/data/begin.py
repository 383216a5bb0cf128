"""The tokens with which a tokenizer begins a text, and the tokens between two documents of a stream."""

from typing import Any

# Any text of one word: only what the tokenizer adds before it is read.
_PROBE = "a"


def begin_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that a tokenizer of transformers adds before a text by itself; () where it adds none.

    Read from an encoded text: a tokenizer may have a bos_token that it never adds, and some add two tokens.
    """
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return tuple(whole[:count])
    return ()


def separator_tokens(tokenizer: Any, begin: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Ids that stand before every document of a stream, so that a model sees where one document ends.

    begin: ids that begin each window, () if none do. They also begin each document. Without them the tokenizer's own
    begin of a text, else its end-of-text token, as in training on packed documents, else its bos_token.
    """
    if begin or (begin := begin_tokens(tokenizer)):
        return begin
    # A bos_token that the tokenizer does not add is not how its texts begin: that of a chat model begins a turn.
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next(((token,) for token in ids if token is not None), ())
