"""Options of the command line: flat keys with their types and accepted values."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import method, method_names
from hasten.jobs.cli.quotes import unquoted, with_quotes

# Words that ask for a sweep, and for a dry run in place of a run.
MULTIRUN = ("-m", "--multirun")
PLAN = "plan=true"

S = TypeVar("S")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Option:
    """A `key=value` option. kind: type without None. optional: None is allowed. group: the value names a method.

    words: texts that stand for a number, or for a number in a list. methods: family of methods that the value lists.
    """

    key: str
    kind: Any
    optional: bool = False
    default: object = None
    help: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    group: bool = False
    path: str | None = None
    words: tuple[str, ...] = ()
    methods: str = ""

    @property
    def expected(self) -> str:
        """Accepted values, in words."""
        if self.methods:
            return f"a list of different methods among {', '.join(self.choices)}"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = _EXPECTED.get(self.kind, "a value")
        if typing.get_origin(self.kind) is list:
            nested = typing.get_origin(typing.get_args(self.kind)[0]) is list
            words = "a list such as [[1,100],[2,100]]" if nested else "a list such as [a,b]"
        if self.at_least is not None and self.at_most is not None:
            words += f" from {self.at_least:g} to {self.at_most:g}"
        elif self.at_least is not None:
            words += f", {self.at_least:g} or more"
        return words + "".join(f", or {word}" for word in (*self.words, *(("null",) if self.optional else ())))

    def parse(self, text: str) -> Any:
        """The value of a text, which may be quoted; UserError names the key, the text and the accepted values."""
        content = unquoted(text)
        if content is None and self.optional and text.lower() in ("null", "none"):
            return None
        try:
            if content is not None:
                value = _read_quoted(self.kind, content, self.words)
            else:
                value = text if text in self.words and self.kind is int else _read(self.kind, text, self.words)
        except (ValueError, yaml.YAMLError):
            raise self._refusal(text, _several(text)) from None
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """UserError if a value of the right type is not one of the choices or out of range."""
        if value is None or (isinstance(value, str) and value in self.words):
            return
        if self.methods:
            wrong = next((name for name in value if name not in self.choices or value.count(name) > 1), None)
            if wrong is not None:
                near = None if wrong in self.choices else nearest(str(wrong), self.choices)
                raise self._refusal(f"[{','.join(map(str, value))}]", f" (did you mean {near}?)" if near else "")
            return
        low = self.at_least is not None and value < self.at_least
        high = self.at_most is not None and value > self.at_most
        if low or high or (self.choices and value not in self.choices):
            near = nearest(str(value), self.choices)
            raise self._refusal(value, f" (did you mean {near}?)" if near else "")

    def _refusal(self, value: object, hint: str = "") -> UserError:
        return UserError(f"{self.key}={value} is wrong: expected {self.expected}{hint}")


def _several(text: str) -> str:
    """A hint if the text looks like several values of a sweep, else an empty text."""
    several = "," in text.strip("[]") and not text.startswith("[")
    return "; several values are a sweep, with --multirun" if several else ""


def _read(kind: Any, text: str, words: tuple[str, ...] = ()) -> Any:
    """The text as a value of that kind; ValueError if it is not one. words: also accepted as members of a list."""
    if kind is str:
        return text
    if kind in (int, float):
        value = kind(text)
        if value != value:
            raise ValueError(text)
        return value
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        if typing.get_origin(inner) is not list and not text.lstrip().startswith("["):
            return [text if text in words else _read(inner, text)]
        return _listed(kind, _structure(text), words)
    return _structure(text)


def _read_quoted(kind: Any, text: str, words: tuple[str, ...] = ()) -> Any:
    """The content of a quoted text as a value of that kind: a text, or what a text stands for."""
    if text in words:
        return [text] if typing.get_origin(kind) is list else text
    if kind in (int, float, bool):
        return _read(kind, text)
    return [_read(typing.get_args(kind)[0], text)] if typing.get_origin(kind) is list else text


def _structure(text: str) -> Any:
    """A list, dictionary or simple value, in Hydra's grammar where texts in it are quoted, else in YAML's."""
    value = with_quotes(text)
    return yaml.safe_load(text) if value is None else value


def _listed(kind: Any, value: Any, words: tuple[str, ...] = ()) -> Any:
    if typing.get_origin(kind) is not list:
        if value in words:
            return value
        if kind is str and isinstance(value, (int, float)):
            return str(value)
        if kind is float and type(value) is int:
            return float(value)
        return value if type(value) is kind else _fail(value)
    if not isinstance(value, list):
        _fail(value)
    return [_listed(typing.get_args(kind)[0], item, words) for item in value]


def _fail(value: object) -> typing.NoReturn:
    raise ValueError(value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word with the most similar spelling, None if none is close."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not matches:
        # Compare the part after the last dot, too: `groupsize` is close to `calibration.group_size`.
        last = {key.rpartition(".")[2]: key for key in reversed(known)}
        matches = [last[key] for key in difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return matches[0] if matches else None


def options(schema: type, prefix: str = "") -> list[Option]:
    """Every option of a job's dataclass: `model` first, then those of the class, of its base, and so on.

    Keys of nested dataclasses are `section.key`.
    """
    hints = typing.get_type_hints(schema)
    collected: list[Option] = []
    distance = {name: steps for steps, base in enumerate(schema.__mro__) for name in inspect.get_annotations(base)}
    for item in sorted(dataclasses.fields(schema), key=lambda item: (item.name != "model", distance[item.name])):
        kind, optional = _without_none(hints[item.name])
        if item.metadata.get("words"):
            kind = _number(kind)
        if dataclasses.is_dataclass(kind):
            collected += options(typing.cast(type, kind), f"{prefix}{item.name}.")
            continue
        rules = dict(item.metadata)
        if rules.get("hidden"):
            continue
        text = rules.pop("help", "")
        if rules.get("group"):
            rules["choices"] = tuple(method_names(item.name))
            kind = str
        if rules.get("methods"):
            rules["choices"] = tuple(method_names(rules["methods"]))
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        collected.append(Option(prefix + item.name, kind, optional, default, text, **rules))
    return collected


def value_at(config: object, key: str) -> Any:
    """Value of an option in a job's config; dots in the key separate sections.

    None for hyper-parameters that are not in the config, so have their defaults.
    """
    for name in key.split("."):
        if config is None:
            return None
        config = config.get(name) if isinstance(config, dict) else getattr(config, name)
    return config


def set_value(config: object, key: str, value: object) -> None:
    """Set an option of a job's config."""
    section, _, name = key.rpartition(".")
    setattr(value_at(config, section) if section else config, name, value)


def method_options(group: str, name: str) -> list[Option]:
    """Options `group.field` for the hyper-parameters of a method."""
    return [Option(f"{group}.{item.name}", item.kind, item.optional) for item in method(group, name).fields]


def listed_method_options(family: str, names: Iterable[str]) -> list[Option]:
    """Options `family.name.field` for the hyper-parameters of methods in a list."""
    return [
        Option(f"{family}.{name}.{item.name}", item.kind, item.optional)
        for name in names
        for item in method(family, name).fields
    ]


def split_plan(words: Iterable[str]) -> tuple[bool, list[str]]:
    """Whether the words ask for a dry run, and the words without plan=…; UserError for the dry run of a sweep."""
    words = list(words)
    if PLAN in words and set(MULTIRUN) & set(words):
        raise UserError(f"{PLAN} plans one run: leave --multirun and lists of values out")
    return PLAN in words, [word for word in words if word not in (PLAN, "plan=false")]


def split_off(schema: type[S], prefix: str, words: Iterable[str]) -> tuple[S, list[str]]:
    """A dataclass filled from the `key=value` words whose keys begin with its prefix, and the remaining words.

    UserError names the first word that is wrong.
    """
    known = {item.key: item for item in options(schema, prefix)}
    values, remaining = {}, []
    for word in words:
        key, sign, text = word.partition("=")
        if not key.startswith(prefix):
            remaining.append(word)
            continue
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"unknown option {key!r}: {hint}")
        if not sign:
            raise UserError(f"{word!r} is no option: options are written key=value")
        values[key.removeprefix(prefix)] = known[key].parse(text)
    return schema(**values), remaining


def _number(kind: Any) -> Any:
    """Kind of a number, or list of numbers, for which a text may stand: `int` of `list[int | str]` is `list[int]`."""
    if typing.get_origin(kind) is not list:
        return kind
    inner, _ = _without_none(typing.get_args(kind)[0])
    return types.GenericAlias(list, (inner,))


def _without_none(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], type(None) in typing.get_args(hint)
    return hint, False
