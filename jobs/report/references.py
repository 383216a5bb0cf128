"""Sorts runs by what their quality refers to, within which their KL divergences and perplexities are comparable."""

from collections.abc import Hashable, Mapping, Sequence

from hasten.jobs.common.reference import Reference, reference
from hasten.jobs.descriptors.metrics import QUALITY
from hasten.jobs.report import metrics as known
from hasten.jobs.report.reading import Entry
from hasten.jobs.report.settings import shown

_FINGERPRINT = ".fingerprint"


def reference_numbers(entries: Sequence[Entry]) -> list[int | None]:
    """For each entry the number of its reference, equal for comparable ones; None for jobs that measure no quality.

    An entry without a quality, such as a failed one, is with the first that has the same original, or by itself.
    """
    references = [reference(entry.config, entry.report) for entry in entries]
    measured = [index for index, entry in enumerate(entries) if _has_quality(entry)]
    keys = _keys(references, measured)
    originals: dict[object, Hashable] = {}
    for index in measured:
        originals.setdefault(references[index].options.get("original"), keys[index])
    jobs = {entries[index].job for index in measured}
    for index, entry in enumerate(entries):
        if index not in keys and entry.job in jobs:
            original = references[index].options.get("original")
            keys[index] = keys[measured[0]] if original is None else originals.setdefault(original, original)
    order = list(dict.fromkeys(keys[index] for index in sorted(keys)))
    return [order.index(keys[index]) if index in keys else None for index in range(len(entries))]


def _keys(references: Sequence[Reference], measured: Sequence[int]) -> dict[int, Hashable]:
    """By index: the fingerprints; without them those of runs with the same options, if they agree; else the options."""
    keys: dict[int, Hashable] = {}
    of_options: dict[Hashable, set[Hashable]] = {}
    for index in measured:
        if "text" in references[index].fingerprints:
            keys[index] = _fingerprints(references[index])
            of_options.setdefault(_hashable(references[index]), set()).add(keys[index])
    for index in measured:
        if index not in keys:
            options = _hashable(references[index])
            same = of_options.get(options, set())
            keys[index] = next(iter(same)) if len(same) == 1 else options
    return keys


def described(members: Mapping[int | None, Sequence[Entry]]) -> dict[int | None, str]:
    """For each reference, by its number, the options that tell it from the others; empty if it is the only one.

    members: entries by the number of their reference.
    """
    texts = {
        number: _texts(next((entry for entry in entries if _has_quality(entry)), entries[0]))
        for number, entries in members.items()
    }
    keys = list(dict.fromkeys(key for values in texts.values() for key in values))
    differing = [key for key in keys if len({values.get(key) for values in texts.values()}) > 1]
    options = [key for key in differing if not key.endswith(_FINGERPRINT)]
    # Fingerprints are shown where the options do not tell two references apart.
    are_told_apart = len({tuple(values.get(key) for key in options) for values in texts.values()}) == len(texts)
    return {
        number: " ".join(f"{key}={values[key]}" for key in (options if are_told_apart else differing) if key in values)
        for number, values in texts.items()
    }


def _has_quality(entry: Entry) -> bool:
    return entry.finished and any(known.number(entry.metrics.get(name)) is not None for name in QUALITY)


def _hashable(each: Reference) -> Hashable:
    return tuple(sorted((key, shown(value)) for key, value in each.options.items()))


def _fingerprints(each: Reference) -> Hashable:
    original = each.fingerprints.get("original") or shown(each.options.get("original"))
    return original, each.fingerprints.get("tokenizer"), each.fingerprints["text"]


def _texts(entry: Entry) -> dict[str, str]:
    found = reference(entry.config, entry.report)
    texts = {key: shown(value) for key, value in found.options.items()}
    return texts | {f"{name}{_FINGERPRINT}": text[:8] for name, text in found.fingerprints.items()}
