"""Shared by jobs about KV caches: methods and levels as they are given, like `kivi:bits=4`."""

import json

from hasten.accel.cache.base import CacheBudget, CacheLevel, CacheMethod, check_budget
from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import build, method, method_names, target_of
from hasten.jobs.common.records import Record

_BUDGET = "budget"


def parse_method(text: str) -> CacheMethod:
    """Method of a text like `kivi` or `kivi:bits=4,block=64`."""
    name, fields = _parsed("method", text)
    made: CacheMethod = build(_settings("method", text, name, fields))
    return made


def parse_level(text: str) -> CacheLevel:
    """Method and budget of a text like `kivi:bits=4` or `snapkv:budget=0.25`."""
    name, fields = _parsed("levels", text)
    budget = _budget(text, fields.pop(_BUDGET)) if _BUDGET in fields else None
    made: CacheMethod = build(_settings("levels", text, name, fields))
    if made.has_budget and budget is None:
        raise UserError(f"levels={text} keeps a budget: write {text}{',' if fields else ':'}budget=0.25, or tokens")
    check_budget(made, budget)
    return CacheLevel(made, budget)


def _budget(text: str, value: object) -> CacheBudget:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"levels={text}: budget={value} is no number")
    return CacheBudget(value)


def _parsed(option: str, text: str) -> tuple[str, dict[str, object]]:
    """Name and fields of `NAME:FIELD=VALUE,FIELD=VALUE`; UserError names the option."""
    name, _, given = text.partition(":")
    known = method_names("cache")
    if name not in known:
        raise UserError(f"{option}={name} is none of {', '.join(known)}")
    texts = [field.name for field in method("cache", name).fields if field.kind is str]
    fields: dict[str, object] = {}
    for item in filter(None, given.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise UserError(f"{option}={text} has {item!r}: expected NAME:FIELD=VALUE,FIELD=VALUE")
        try:
            fields[key] = value if key in texts and value != "null" else json.loads(value)
        except ValueError:
            raise UserError(f"{option}={text}: {key}={value} is no number, true or false") from None
    return name, fields


def _settings(option: str, text: str, name: str, fields: dict[str, object]) -> Record:
    own = [field.name for field in method("cache", name).fields]
    if not set(fields) <= set(own):
        raise UserError(f"{option}={text} is wrong: {name} has {', '.join(own) or 'no hyper-parameters'}")
    return {"_target_": target_of("cache", name), **fields}
