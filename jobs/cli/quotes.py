"""Quoted values of the command line, in Hydra's grammar: `"output='runs/a b,=[x]'"` names the folder `runs/a b,=[x]`.

Hydra's parser is imported only for words that hold a quote. Texts that are no value of its grammar stay as they are.
"""

import re
from pathlib import Path

_QUOTES = ("'", '"')
# Texts that every command reads as one value, a sweep too.
_PLAIN = re.compile(r"[\w./:~+@%-]*")


def unquoted(text: str) -> str | None:
    """Content of a text that is one quoted value; None for any other text."""
    stripped = text.strip()
    if len(stripped) < 2 or stripped[0] not in _QUOTES or stripped[-1] != stripped[0]:
        return None
    value = _parsed(stripped)
    content = getattr(value, "text", None)
    return content if isinstance(content, str) else None


def with_quotes(text: str) -> object:
    """A list or dictionary with quoted texts in it as a plain value; None without any, or outside Hydra's grammar."""
    if not any(quote in text for quote in _QUOTES):
        return None
    value = _parsed(text)
    return _plain(value) if isinstance(value, list | dict) else None


def quoted(text: str) -> str:
    """The text as a quoted value."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def if_needed(text: str) -> str:
    """The text, quoted unless every command reads it as the one value that it is, a sweep too."""
    return text if _PLAIN.fullmatch(text) else quoted(text)


def word(key: str, value: object) -> str:
    """`key=value`, with quotes around a path that a sweep would read as several values, or that has quotes itself."""
    return f"{key}={if_needed(str(value)) if isinstance(value, Path) else value}"


def verbatim(key: str, text: str) -> str:
    """`key=value` for a text without its quotes, such that parsing it does not remove others."""
    return f"{key}={text if unquoted(text) is None else quoted(text)}"


def split(word: str) -> tuple[str, str]:
    """Key of a `key=value` word, and its value without quotes."""
    key, _, text = word.partition("=")
    content = unquoted(text)
    return key, text if content is None else content


def _parsed(text: str) -> object:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"value={text}")._value
    except HydraException:
        return None


def _plain(value: object) -> object:
    """Lists and dictionaries with texts in place of Hydra's quoted strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return getattr(value, "text", value)
