"""Sizes in options: a number with a unit, such as 80GB or 512MiB."""

import re

from hasten.accel.errors import UserError

BYTES = "bytes such as 80GB or 512MiB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtp])(i?)b?|b)?", re.IGNORECASE)
_POWERS = "kmgtp"


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a text such as 80GB or 512MiB; UserError names the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{option}={text} is wrong: expected {BYTES}")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (_POWERS.index(unit.lower()) + 1 if unit else 0))
