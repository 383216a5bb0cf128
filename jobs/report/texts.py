"""Sentences of a report on the texts of runs, and the warnings of runs on models that only guess."""

from collections.abc import Mapping

from hasten.jobs.report.comparison import Group

_OWN = ", hasten's own on a model that is not embedded"


def notes(group: Group) -> list[str]:
    """A line for each text of the group's runs by what it is for, and for each warning of a run."""
    texts: dict[str, list[str]] = {}
    warnings: list[str] = []
    for row in group.rows:
        named = row.entry.report.get("texts")
        for role, text in named.items() if isinstance(named, Mapping) else ():
            if isinstance(text, Mapping) and (words := _text(text)) not in texts.setdefault(role, []):
                texts[role].append(words)
        listed = row.entry.report.get("warnings")
        warnings += [f"{row.label}: {warning}" for warning in listed] if isinstance(listed, list) else []
    lines = [f"{role} on {'; '.join(words)}" for role, words in texts.items() if words]
    return [*lines, *dict.fromkeys(warnings)]


def _text(text: Mapping[str, object]) -> str:
    begin = f", windows begin with {text['begin_text']}" if text.get("begin_text") else ""
    own = _OWN if text.get("is_own_text") else ""
    return f"{text.get('tokens')} tokens of {text.get('source')}{own}{begin}"
