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
# make(encode, filler lines, tokens of the context, generator, turns).
Task = Callable[[Encode, Sequence[str], int, random.Random, int], "Sample"]
_NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet"),
    *("jetty", "knoll", "larch", "maple", "north", "onyx", "pearl", "quill", "river"),
)


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


def needle(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random, turns: int) -> Sample:
    """A sentence with a number for each turn, anywhere among lines of text, and the questions for the numbers."""
    needles: list[tuple[str, str, float]] = []
    for _ in range(turns):
        left = [name for name in _NAMES if name not in {used for used, _, _ in needles}]
        needles.append((generator.choice(left), str(generator.randrange(10**5, 10**6)), generator.random()))

    def text(count: int) -> str:
        lines = list(filler[:count])
        for name, number, place in needles:
            lines.insert(int(place * len(lines)), f"The number of {name} is {number}.\n")
        return "".join(lines)

    context, _ = _fitting(encode, text, len(filler), tokens)
    return Sample(
        context, tuple(_turn(encode, f"\nThe number of {name} is", f" {number}") for name, number, _ in needles)
    )


def keys(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random, turns: int) -> Sample:
    """A list of keys with values, and the question for one of them; with several turns, for as many, each in a line."""
    pairs = _pairs(generator, 4000)

    def text(count: int) -> str:
        return "".join(f"{key} = {value}\n" for key, value in pairs[:count])

    context, count = _fitting(encode, text, len(pairs), tokens)
    if turns == 1:
        asked, end = [pairs[generator.randrange(max(1, count))]], ""
    else:
        asked, end = generator.sample(pairs[: max(1, count)], min(turns, max(1, count))), "\n"
    return Sample(context, tuple(_turn(encode, f"{key} =", f" {value}{end}") for key, value in asked))


def joint(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random, turns: int) -> Sample:
    """A table in which a key has another value in every section: the answer depends on section and key together."""
    sections = [f"{first}_{second}" for first in _NAMES for second in _NAMES]
    generator.shuffle(sections)
    inner = generator.sample(_NAMES, 4)
    values = {(section, key): str(generator.randrange(100, 1000)) for section in sections for key in inner}

    def text(count: int) -> str:
        rows = ("".join(f"  {key}: {values[section, key]}\n" for key in inner) for section in sections[:count])
        return "".join(f"[{section}]\n{row}" for section, row in zip(sections, rows, strict=False))

    context, count = _fitting(encode, text, len(sections), tokens)
    asked = [(sections[generator.randrange(max(1, count))], generator.choice(inner)) for _ in range(turns)]
    end = "" if turns == 1 else "\n"
    questions = ((f"[{section}]\n  {key}:", f" {values[section, key]}{end}") for section, key in asked)
    return Sample(context, tuple(_turn(encode, *question) for question in questions))


def repeated(encode: Encode, filler: Sequence[str], tokens: int, generator: random.Random, turns: int) -> Sample:
    """Lines of text, and after them the beginning of a passage that stands in them: the answer is how it went on."""
    context, _ = _fitting(encode, lambda count: "".join(filler[:count]), len(filler), tokens)
    length = min(48, max(2, len(context) // 4))
    made = []
    for _ in range(turns):
        start = generator.randrange(0, max(1, len(context) - length))
        passage = context[start : start + length]
        half = len(passage) // 2
        made.append(Turn(passage[:half], passage[half:]))
    return Sample(context, tuple(made))


# By name, with the turns of a sample.
TASKS: dict[str, tuple[Task, int]] = {
    "needle": (needle, 1),
    "keys": (keys, 1),
    "joint": (joint, 1),
    "repeated": (repeated, 1),
    "multi_turn": (keys, 4),
}


def samples(task: str, encode: Encode, text: str, tokens: int, count: int, seed: int) -> list[Sample]:
    """Samples of a task with contexts of at most `tokens`; text: lines that fill contexts, another part in each."""
    if task not in TASKS:
        raise UserError(f"tasks={task} is none of text, {', '.join(TASKS)}")
    make, turns = TASKS[task]
    lines = text.splitlines(keepends=True)
    made = []
    for number in range(count):
        generator = random.Random(f"{seed} {task} {number}")
        first = generator.randrange(max(1, len(lines) // 2))
        made.append(make(encode, lines[first:], tokens, generator, turns))
    return made


def _pairs(generator: random.Random, count: int) -> list[tuple[str, str]]:
    numbers = generator.sample(range(1000, 10000), count)
    return [(f"{generator.choice(_NAMES)}_{number}", str(generator.randrange(100, 1000))) for number in numbers]


def _turn(encode: Encode, question: str, answer: str) -> Turn:
    """Tokens of both: those of the whole that the question alone does not begin with are the answer."""
    asked, whole = encode(question), encode(question + answer)
    same = next((place for place, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
    return Turn(tuple(whole[:same]), tuple(whole[same:]))


def _fitting(encode: Encode, text: Callable[[int], str], most: int, tokens: int) -> tuple[tuple[int, ...], int]:
    """The largest text(count) that has at most `tokens` tokens, as token ids, and the count."""
    low, fits, high = 0, encode(text(0)), min(1, most)
    while len(over := encode(text(high))) <= tokens:
        low, fits = high, over
        if low == most:
            return tuple(fits), low
        high = min(2 * high, most)
    above = len(over)
    # Interpolated: a text's tokens are about proportional to its lines.
    while high - low > 1:
        guess = low + (high - low) * (tokens - len(fits)) // (above - len(fits))
        middle = min(max(guess, low + 1), high - 1)
        found = encode(text(middle))
        if len(found) <= tokens:
            low, fits = middle, found
        else:
            high, above = middle, len(found)
    return tuple(fits), low
