"""Recall tasks: texts whose continuation stands somewhere in them, made for any tokenizer from a seed.

Every sample is a context and turns, each a question and the answer that the context gives. A model that reads its whole
context answers as well as it can; how much a smaller cache lowers that is what is measured.
Source: needle in a haystack and key retrieval as in Hsieh et al. 2024, arXiv:2404.06654 (RULER); joint recall as in
Zhan et al. 2025, arXiv:2507.00449 (HAX).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.accel.errors import UserError

Encode = Callable[[str], list[int]]
_NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet"),
    *("jetty", "knoll", "larch", "maple", "north", "onyx", "pearl", "quill", "river"),
)
# Bisections of the amount of text that fills a context.
_STEPS = 24


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as token ids."""

    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """context: token ids. turns: asked one after the other, each with the answers of those before it."""

    context: tuple[int, ...]
    turns: tuple[Turn, ...]


def needle(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random) -> Sample:
    """One sentence with a number among lines of text, and the question for the number at the end."""
    name, number = generator.choice(_NAMES), str(generator.randrange(10**5, 10**6))
    line = f"The number of {name} is {number}.\n"
    place = generator.random()

    def text(count: int) -> str:
        lines = list(filler[:count])
        lines.insert(int(place * len(lines)), line)
        return "".join(lines)

    context = _fitting(encode, text, len(filler), tokens)
    return Sample(context, (_turn(encode, f"\nThe number of {name} is", f" {number}"),))


def keys(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random) -> Sample:
    """A list of keys with values, and the question for one of them."""
    pairs = _pairs(generator, 4000)

    def text(count: int) -> str:
        return "".join(f"{key} = {value}\n" for key, value in pairs[:count])

    context, count = _counted(encode, text, len(pairs), tokens)
    key, value = pairs[generator.randrange(max(1, count))]
    return Sample(context, (_turn(encode, f"{key} =", f" {value}"),))


def multi_turn(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random) -> Sample:
    """The same list, with questions for several of its keys, one after the other."""
    pairs = _pairs(generator, 4000)

    def text(count: int) -> str:
        return "".join(f"{key} = {value}\n" for key, value in pairs[:count])

    context, count = _counted(encode, text, len(pairs), tokens)
    asked = generator.sample(pairs[: max(4, count)], 4)
    return Sample(context, tuple(_turn(encode, f"{key} =", f" {value}\n") for key, value in asked))


def joint(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random) -> Sample:
    """A table in which a key has another value in every section: the answer depends on section and key together."""
    sections = [f"{first}_{second}" for first in _NAMES for second in _NAMES]
    generator.shuffle(sections)
    inner = generator.sample(_NAMES, 4)
    values = {(section, key): str(generator.randrange(100, 1000)) for section in sections for key in inner}

    def text(count: int) -> str:
        rows = ("".join(f"  {key}: {values[section, key]}\n" for key in inner) for section in sections[:count])
        return "".join(f"[{section}]\n{row}" for section, row in zip(sections, rows, strict=False))

    context, count = _counted(encode, text, len(sections), tokens)
    section, key = sections[generator.randrange(max(1, count))], generator.choice(inner)
    return Sample(context, (_turn(encode, f"[{section}]\n  {key}:", f" {values[section, key]}"),))


def repeated(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random) -> Sample:
    """Lines of text, and after them the beginning of a passage that stands in them: the answer is how it went on."""
    context = _fitting(encode, lambda count: "".join(filler[:count]), len(filler), tokens)
    length = min(48, max(2, len(context) // 4))
    start = generator.randrange(0, max(1, len(context) - length))
    passage = context[start : start + length]
    half = len(passage) // 2
    return Sample(context, (Turn(passage[:half], passage[half:]),))


TASKS: dict[str, Callable[[Encode, Sequence[str], int, random.Random], Sample]] = {
    "needle": needle,
    "keys": keys,
    "joint": joint,
    "repeated": repeated,
    "multi_turn": multi_turn,
}


def samples(task: str, encode: Encode, text: str, tokens: int, count: int, seed: int) -> list[Sample]:
    """Samples of a task with contexts of at most `tokens`; text: lines that fill contexts, another part in each."""
    if task not in TASKS:
        raise UserError(f"tasks={task} is none of text, {', '.join(TASKS)}")
    lines = text.splitlines(keepends=True)
    made = []
    for number in range(count):
        generator = random.Random(f"{seed} {task} {number}")
        first = generator.randrange(max(1, len(lines) // 2))
        made.append(TASKS[task](encode, lines[first:], tokens, generator))
    return made


def _pairs(generator: random.Random, count: int) -> list[tuple[str, str]]:
    numbers = generator.sample(range(1000, 10000), count)
    return [(f"{generator.choice(_NAMES)}_{number}", str(generator.randrange(100, 1000))) for number in numbers]


def _turn(encode: Encode, question: str, answer: str) -> Turn:
    """Tokens of both: those of the whole that the question alone does not begin with are the answer."""
    asked, whole = encode(question), encode(question + answer)
    same = next((place for place, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
    return Turn(tuple(whole[:same]), tuple(whole[same:]))


def _counted(encode: Encode, text: Callable[[int], str], most: int, tokens: int) -> tuple[tuple[int, ...], int]:
    """The largest text(count) that has at most `tokens` tokens, as token ids, and the count."""
    low, high = 0, most
    for _ in range(_STEPS):
        middle = (low + high + 1) // 2
        if low == high:
            break
        if len(encode(text(middle))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return tuple(encode(text(low))), low


def _fitting(encode: Encode, text: Callable[[int], str], most: int, tokens: int) -> tuple[int, ...]:
    return _counted(encode, text, most, tokens)[0]
