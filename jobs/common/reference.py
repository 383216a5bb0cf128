"""What a run's KL divergence and perplexity refer to: the original model, the tokenizer, and the evaluation text.

Values of different references are not comparable. Reports name them by fingerprints; those of older runs, which lack
them, by the options that choose them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Where a report has the fingerprints.
_FINGERPRINTS = {
    "original": ("original", "fingerprint"),
    "tokenizer": ("tokenizer", "fingerprint"),
    "text": ("texts", "evaluation", "fingerprint"),
}


@dataclass(frozen=True)
class Reference:
    """What the quality of a run refers to.

    options: values by the option's key, the original model as `original`. fingerprints: of original, tokenizer, text.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, str]:
        """Options and fingerprints as tags of an MLflow run."""
        options = {f"hasten.{key}": str(value) for key, value in self.options.items() if value is not None}
        return options | {f"hasten.{name}.fingerprint": text for name, text in self.fingerprints.items()}


def reference(config: Mapping[str, object], report: Mapping[str, object] | None = None) -> Reference:
    """Reference of a run with this config and, once it has finished, report; empty if the job measures no quality."""
    evaluation = config.get("evaluation")
    options: dict[str, object] = {}
    if isinstance(evaluation, Mapping):
        options["original"] = _name(config.get("original") or config.get("model"))
        options |= {f"evaluation.{key}": value for key, value in evaluation.items()}
        calibration = config.get("calibration")
        if evaluation.get("source") is None and isinstance(calibration, Mapping):
            # By default quality is measured on another part of the calibration text.
            options["evaluation.source"] = calibration.get("source")
    found = {name: _at(report or {}, path) for name, path in _FINGERPRINTS.items()}
    return Reference(options, {name: text for name, text in found.items() if text is not None})


def _name(model: object) -> object:
    return model.rstrip("/") if isinstance(model, str) else model


def _at(report: Mapping[str, object], path: tuple[str, ...]) -> str | None:
    value: object = report
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
