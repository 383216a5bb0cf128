"""Makes a job's config from `key=value` words: Hydra composes the files, the job's options check the values."""

import copy
from collections.abc import Collection, Hashable, Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import job_file
from hasten.jobs.cli.options import Option, listed_method_options, method_options, nearest, options, value_at
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Run

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF_MODULE = "hasten.conf"
C = TypeVar("C", bound=Run)
# Older name of cache_folder, for jobs that have no option of this name.
_OLD_FOLDER = "cache"


def compose(job: str, schema: type[C], words: list[str]) -> C:
    """Config of a job, an object of its dataclass; UserError names the first wrong word."""
    known = {item.key: item for item in options(schema)}
    assigned = _split(words, known)
    defaults = _defaults(job)
    groups = {}
    for key in [key for key, item in known.items() if item.group]:
        groups[key] = known[key].parse(assigned.pop(key)) if key in assigned else defaults[key]
        known |= {item.key: item for item in method_options(key, groups[key])}
    lists = {}
    for item in [item for item in known.values() if item.methods]:
        names = item.parse(assigned[item.key]) if item.key in assigned else job_file(job).get(item.key, item.default)
        lists[item.methods] = names
        known |= {option.key: option for option in listed_method_options(item.methods, names)}
    values = {}
    for key, text in assigned.items():
        if key not in known:
            raise UserError(_unknown(job, key, known, groups, lists))
        values[key] = known[key].parse(text)
    config = _composed(job, schema, groups, values, {*groups, *lists})
    _check(config, known.values())
    return config


def _split(words: list[str], known: Iterable[str]) -> dict[str, str]:
    """Keys and texts of `key=value` words; a later word replaces an earlier one of the same key."""
    texts = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            near = nearest(word.lstrip("-"), known)
            hint = f", did you mean {near}=VALUE?" if near else ""
            raise UserError(f"{word!r} is no option: options are written key=value{hint}")
        if key == _OLD_FOLDER and key not in known:
            key = "cache_folder"
        # The name of a section of options stands for its source: data=FILE.
        texts[f"{key}.source" if key not in known and f"{key}.source" in known else key] = text
    return texts


def _unknown(job: str, key: str, known: dict[str, Option], groups: dict[str, str], lists: dict[str, list[str]]) -> str:
    near = nearest(key.lstrip("-+~"), known)
    group = key.partition(".")[0]
    if group in lists and key.count(".") == 2:
        name = key.split(".")[1]
        if name not in lists[group]:
            return f"unknown option {key!r}: {group}s=[{','.join(lists[group])}] does not have {name}"
        if not (near and near.startswith(f"{group}.{name}.")):
            return f"unknown option {key!r}: {name} has no such option"
    if group in groups and not (near and near.startswith(f"{group}.")):
        return f"unknown option {key!r}: {group}={groups[group]} has no such option"
    hint = f"did you mean {near}?" if near else f"see hasten {job} --help"
    return f"unknown option {key!r}: {hint}"


def _defaults(job: str) -> dict[str, str]:
    """Method that the job's file chooses, by group."""
    entries = job_file(job).get("defaults", [])
    return {key: name for entry in entries if isinstance(entry, dict) for key, name in entry.items()}


def _composed(job: str, schema: type[C], groups: dict[str, str], values: Record, open_keys: Collection[str]) -> C:
    # Benchmarks' options are read for their help, and Hydra takes longer to import than the help to print.
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    composed = copy.deepcopy(_with_groups(CONF_MODULE, job, cast(Hashable, schema), tuple(groups.items())))
    key = ""
    try:
        for key, value in values.items():
            # Defaults of hyper-parameters are in the method's dataclass, so the composed config lacks their keys.
            OmegaConf.update(composed, key, value, force_add=key.partition(".")[0] in open_keys)
        return cast(C, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        key = error.full_key or key
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"{key}=??? is wrong: ??? stands for a missing value") from None
        reason = str(error).splitlines()[0]
        right = r"${KEY} stands for the value of option KEY; write \${ for the characters themselves"
        raise UserError(f"{key}={values.get(key)} is wrong ({reason}): {right}") from None


@cache
def _with_groups(folder: str, job: str, schema: Hashable, groups: tuple[tuple[str, str], ...]) -> "DictConfig":
    """Hydra's config of a job's file and the chosen methods; cached, since most points of a sweep share it."""
    import hydra
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{job}_schema", node=schema)
    with hydra.initialize_config_module(folder, version_base="1.3"):
        return hydra.compose(job, overrides=[f"{key}={name}" for key, name in groups])


def _check(config: Run, known: Iterable[Option]) -> None:
    """Check values from files, too, by the rules of the command line."""
    for item in known:
        if not item.group:
            item.check(value_at(config, item.key))
