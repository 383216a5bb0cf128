"""Configurations of runs as flat settings, and the choice of settings that differ."""

from collections.abc import Mapping, Sequence

from hasten.jobs.report.reading import Entry, Source

# Options that affect where results and logs are written, but not the results.
_PLACES = ("run_dir", "output", "overwrite", "stream", "tracking", "address")


def flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Values by `section.key`. A method becomes `FAMILY`, its name, and `FAMILY.FIELD`, its hyper-parameters."""
    values: dict[str, object] = {}
    for key, value in config.items():
        if key == "_target_":
            values[prefix.removesuffix(".")] = _method(value)
        elif not prefix and key in _PLACES:
            continue
        elif isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def settings(entry: Entry) -> dict[str, object]:
    """Settings of an entry; values of a sweep or a budget override the configuration."""
    return flat(entry.config) | dict(entry.values)


def differing(sources: Sequence[Source], entries: Sequence[Entry]) -> list[str]:
    """Settings that become columns of the table of these entries.

    For a single sweep, the varied options; otherwise these and all settings with different values. A setting that only
    some configurations have, such as a hyper-parameter of one method, is compared among these.
    """
    varied = list(dict.fromkeys(key for source in sources for key in source.varied or ()))
    chosen = list(dict.fromkeys(key for entry in entries for key in entry.values))
    if len(sources) == 1 and sources[0].varied is not None:
        return list(dict.fromkeys(varied + chosen))
    known: dict[str, set[str]] = {}
    for entry in entries:
        for key, value in settings(entry).items():
            known.setdefault(key, set()).add(shown(value))
    different = [key for key, values in known.items() if len(values) > 1]
    return list(dict.fromkeys([*(key for key in varied + chosen if key in known), *different]))


def common(entries: Sequence[Entry]) -> dict[str, str]:
    """Settings that are the same in all entries with a configuration, as text."""
    known = [settings(entry) for entry in entries if entry.config]
    if not known:
        return {}
    return {
        key: shown(value)
        for key, value in known[0].items()
        if all(key in each and shown(each[key]) == shown(value) for each in known)
    }


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(item) for item in value)}]"
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
        return " ".join(
            [_method(value["_target_"]), *(shown(item) for key, item in value.items() if key != "_target_")]
        )
    return str(value)


def _method(target: object) -> str:
    """Name of a method, taken from its module: gptq for hasten.accel.compression.quantizers.gptq.GPTQ."""
    return str(target).rpartition(".")[0].rpartition(".")[2] or str(target)
