"""Sweeps in MLflow: a parent run, and a child run for each point, which the sweep's driver writes from the journals.

A child run is identified by tags for its parent and its point. After a driver was killed, the next driver finds the
child runs by these tags: it deletes and rewrites those that are not tagged as complete, so that nothing is there twice.
"""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from hasten.cluster.tracking import events
from hasten.cluster.tracking.environment import write_environment
from hasten.cluster.tracking.journal import Reader
from hasten.cluster.tracking.mlflow_writer import Writer, run_tags
from hasten.cluster.tracking.mlflow_writer import status as run_status

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LOG = logging.getLogger(__name__)
_SWEEP, _POINT, _COMPLETE = "hasten.sweep", "hasten.point", "hasten.whole"
_ARTIFACTS = ("report.json", "hasten.log", "output.txt")
_PAGE = 1000
_JOURNAL_SECONDS = 10.0
# MLflow's own limit.
_VALUE_CHARACTERS = 6000


class SweepTracker:
    """Context of a sweep's runs; entering it raises UserError if the store cannot be reached.

    name: of the parent run. key: identifies the parent run when the sweep is resumed. folder: of the sweep.
    """

    def __init__(self, uri: str | None, experiment: str, name: str, key: str, folder: Path) -> None:
        self._writer = Writer(uri, experiment)
        self._name, self._key, self._folder = name, key, folder
        self._parent = ""
        # Child run of each point: MLflow's id, and whether it is complete.
        self._children: dict[str, tuple[str, bool]] = {}
        self._readers: dict[str, tuple[Path, Reader]] = {}
        self._polling: Future[None] | None = None
        self._finished = False

    def __enter__(self) -> "SweepTracker":
        self._writer.open()
        self._writer.submit(self._begin)
        environment = write_environment(self._folder, self.uri)
        self._writer.submit(self._write_parent, [events.Artifact(str(environment))])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self._finished:
            self._writer.submit(self._terminate, run_status(error), list(self._readers))
        self._writer.close()

    @property
    def uri(self) -> str:
        """URI of the store; a sqlite path in it is absolute."""
        return self._writer.uri

    def params(self, values: Mapping[str, str]) -> None:
        """Log parameters of the parent run; those that exist are kept, because MLflow does not change parameters."""
        self._writer.submit(self._write_params, dict(values))

    def begin(self, point: str, folder: Path) -> None:
        """A point has started in a folder: each `poll` writes its new events."""
        self._readers[point] = folder, Reader(folder)

    def poll(self) -> None:
        """Write the new events of running points, unless the previous poll is still writing."""
        if self._polling is None or self._polling.done():
            self._polling = self._writer.submit(self._follow, dict(self._readers))

    def end(self, point: str, folder: Path, status: str, error: str | None = None) -> None:
        """A point has ended, now or under an earlier driver. status: MLflow's."""
        _, reader = self._readers.pop(point, (folder, Reader(folder)))
        self._writer.submit(self._finish, point, folder, reader, status, error)

    def finish(self, status: str, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """The sweep has ended; returns when everything is written. status: MLflow's.

        Child runs of points that have started but not ended are marked KILLED.
        """
        final: list[events.Event] = [events.Metrics(metrics), *(events.Artifact(str(path)) for path in artifacts)]
        self._writer.submit(self._write_parent, final)
        self._finished = True
        self._writer.submit(self._terminate, status, list(self._readers)).result()

    def _begin(self, client: "MlflowClient", experiment: str) -> None:
        """Find the parent run and its child runs, or create the parent run."""
        parents = client.search_runs([experiment], f"tags.`{_SWEEP}` = '{self._key}'", max_results=1)
        if parents:
            self._parent = parents[0].info.run_id
            client.update_run(self._parent, status="RUNNING")
            for name, value in run_tags(self._folder).items():
                client.set_tag(self._parent, name, value)
        else:
            tags = {**run_tags(self._folder), _SWEEP: self._key}
            self._parent = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
        page = None
        while True:
            children = client.search_runs(
                [experiment], f"tags.`mlflow.parentRunId` = '{self._parent}'", max_results=_PAGE, page_token=page
            )
            for child in children:
                point = child.data.tags.get(_POINT, "")
                if point in self._children:  # only if two drivers wrote at once, which the sweep's lock prevents
                    client.delete_run(child.info.run_id)
                    continue
                self._children[point] = child.info.run_id, child.data.tags.get(_COMPLETE) == "true"
            page = children.token
            if not page:
                break

    def _follow(self, client: "MlflowClient", experiment: str, readers: Mapping[str, tuple[Path, Reader]]) -> None:
        for point, (folder, reader) in readers.items():
            self._read(client, experiment, point, folder, reader)

    def _read(self, client: "MlflowClient", experiment: str, point: str, folder: Path, reader: Reader) -> None:
        is_new_attempt, new_events = reader.read()
        if is_new_attempt:
            self._create_child(client, experiment, point, folder)
        if new_events and point in self._children:
            events.write(client, self._children[point][0], new_events)

    def _finish(
        self,
        client: "MlflowClient",
        experiment: str,
        point: str,
        folder: Path,
        reader: Reader,
        status: str,
        error: str | None,
    ) -> None:
        if not reader.attempt and self._children.get(point, ("", False))[1]:
            return  # an earlier driver has written the run completely
        self._read(client, experiment, point, folder, reader)
        end = monotonic() + _JOURNAL_SECONDS
        while not reader.attempt and status == "FINISHED" and monotonic() < end:
            sleep(0.5)  # a network folder shows files of other nodes with a delay
            self._read(client, experiment, point, folder, reader)
        if not reader.attempt:  # the point was killed before it wrote its journal
            self._create_child(client, experiment, point, folder)
        run = self._children[point][0]
        events.write(client, run, [events.Artifact(str(folder / name)) for name in _ARTIFACTS])
        if error:
            client.set_tag(run, "hasten.error", error[:5000])
        client.set_terminated(run, status=status)
        # This tag is written last: without it, the next driver rewrites the run.
        client.set_tag(run, _COMPLETE, str(status == "FINISHED").lower())
        self._children[point] = run, status == "FINISHED"

    def _create_child(self, client: "MlflowClient", experiment: str, point: str, folder: Path) -> None:
        """Create the child run of a point; deletes that of an earlier, unfinished attempt."""
        if point in self._children:
            client.delete_run(self._children.pop(point)[0])
        tags = {**run_tags(folder, self._parent), _POINT: point}
        run = client.create_run(experiment, run_name=point, tags=tags)
        self._children[point] = run.info.run_id, False

    def _write_parent(self, client: "MlflowClient", experiment: str, new_events: Iterable[events.Event]) -> None:
        events.write(client, self._parent, new_events)

    def _write_params(self, client: "MlflowClient", experiment: str, values: Mapping[str, str]) -> None:
        existing = client.get_run(self._parent).data.params
        new = {name: value[:_VALUE_CHARACTERS] for name, value in values.items() if name not in existing}
        events.write(client, self._parent, [events.Params(new)])

    def _terminate(self, client: "MlflowClient", experiment: str, status: str, running: Iterable[str]) -> None:
        for point in running:
            if point in self._children:
                client.set_terminated(self._children[point][0], status="KILLED")
        client.set_terminated(self._parent, status=status)
