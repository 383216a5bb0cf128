"""Events that a run logs to its tracking store: parameters, metrics, tags, artifacts and a checkpoint to register."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG = logging.getLogger(__name__)
# MLflow's limits for one call.
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000


@dataclass(frozen=True)
class Params:
    """Parameters by name, as strings."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Metrics:
    """Numbers of one step by name. milliseconds: time since 1970."""

    values: Mapping[str, float]
    step: int = 0
    milliseconds: int = field(default_factory=lambda: int(time.time() * 1000))


@dataclass(frozen=True)
class Tags:
    """Tags by name, by which runs are filtered."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file, read when it is uploaded. folder: its folder among the run's artifacts; None is the top level."""

    path: str
    folder: str | None = None


@dataclass(frozen=True)
class Registered:
    """A finished checkpoint, to register as a new version of the model `name`, with tags."""

    name: str
    path: str
    tags: Mapping[str, str]


Event = Params | Metrics | Tags | Artifact | Registered
_KINDS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in (Params, Metrics, Tags, Artifact, Registered)}


def encode(event: Event) -> str:
    """The event as one line of JSON, for `decode`."""
    return json.dumps({"kind": type(event).__name__.lower(), **dataclasses.asdict(event)})


def decode(line: str) -> Event:
    """The event of a line."""
    values = json.loads(line)
    event: Event = _KINDS[values.pop("kind")](**values)
    return event


def write(client: "MlflowClient", run_id: str, events: Iterable[Event]) -> None:
    """Write events to a run; parameters, metrics and tags are batched up to MLflow's limits.

    Artifacts that no longer exist are skipped: a new attempt of the run has replaced them.
    """
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    params: list[Any] = []
    metrics: list[Any] = []
    tags: list[Any] = []
    rest: list[Event] = []
    for event in events:
        if isinstance(event, Params):
            params += [Param(name, value) for name, value in event.values.items()]
        elif isinstance(event, Metrics):
            metrics += [Metric(name, value, event.milliseconds, event.step) for name, value in event.values.items()]
        elif isinstance(event, Tags):
            tags += [RunTag(name, value) for name, value in event.values.items()]
        else:
            rest.append(event)
    for begin in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[begin : begin + _PARAMS_AT_ONCE])
    for begin in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[begin : begin + _METRICS_AT_ONCE])
    for begin in range(0, len(tags), _PARAMS_AT_ONCE):
        client.log_batch(run_id, tags=tags[begin : begin + _PARAMS_AT_ONCE])
    for event in rest:
        if isinstance(event, Artifact) and Path(event.path).exists():
            client.log_artifact(run_id, event.path, event.folder)
        elif isinstance(event, Registered):
            try:
                _register(client, run_id, event)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                _LOG.warning("tracking.register=%s: %s", event.name, str(error).splitlines()[0])


def _register(client: "MlflowClient", run_id: str, event: Registered) -> None:
    """Create a version of a registered model with the checkpoint's path as its source; nothing is copied.

    An event that is written again, because the first writer was killed, creates no second version.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(event.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = event.path if "://" in event.path else Path(event.path).as_uri()
    tags = dict(event.tags)
    versions = client.search_model_versions(f"name='{event.name}'")
    if not any(version.source == source and version.tags == tags for version in versions):
        client.create_model_version(event.name, source, run_id, tags=tags)
