"""Drafters and verifiers by name, with the hyper-parameters of their config file."""

from dataclasses import replace

import yaml

from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.verifiers.base import Verifier
from hasten.jobs.cli.methods import CONF, build


def drafter(name: str, **options: object) -> Drafter:
    """The drafter of conf/drafter/NAME.yaml; options replace its hyper-parameters."""
    made = build(_settings("drafter", name))
    changed: Drafter = replace(made, **options) if options else made
    return changed


def verifier(name: str) -> Verifier:
    """The verifier of conf/verifier/NAME.yaml."""
    made: Verifier = build(_settings("verifier", name))
    return made


def _settings(group: str, name: str) -> dict[str, object]:
    settings: dict[str, object] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings
