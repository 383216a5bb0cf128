"""What reaches a tracking store: how many at once, which files, and versions of a registered model."""

from pathlib import Path
from typing import Any

import pytest

from hasten.cluster.tracking import events, store
from hasten.cluster.tracking.events import Artifact, Metrics, Params, Registered, Tags, decode, encode

EVENTS = [
    Params({"bits": "4", "ö\u2028\x85": "a\nb"}),
    Metrics({"error": 0.5, "bytes": 1.0}, 3, 1700000000000),
    Tags({"hasten.original": "/models/small"}),
    Artifact("/run/report.json"),
    Artifact("/run/error.png", "figures"),
    Registered("small", "/models/small", {"job": "compress"}),
]


def test_an_event_is_one_line_and_comes_back_as_it_was() -> None:
    lines = [encode(event) for event in EVENTS]
    assert [len(line.splitlines()) for line in lines] == [1] * len(EVENTS)
    assert [decode(line) for line in lines] == EVENTS


class Calls:
    """A client that notes how much each call brings."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.names: list[str] = []

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        assert run_id == "run"
        self.sizes.append((len(metrics), len(params), len(tags)))
        self.names += [entry.key for entry in (*metrics, *params, *tags)]


def test_a_call_brings_as_many_metrics_parameters_and_tags_as_mlflow_takes() -> None:
    calls = Calls()
    told = [
        *(Metrics({"a": step, "b": step}, step) for step in range(1100)),
        *(Params({f"p{number}": "x"}) for number in range(201)),
        Tags({f"t{number}": "x" for number in range(101)}),
    ]
    events.write(calls, "run", told)
    assert calls.sizes == [
        *((0, 100, 0), (0, 100, 0), (0, 1, 0)),
        *((1000, 0, 0), (1000, 0, 0), (200, 0, 0)),
        *((0, 0, 100), (0, 0, 1)),
    ]
    assert sorted(calls.names) == sorted(
        ["a", "b"] * 1100 + [f"p{number}" for number in range(201)] + [f"t{number}" for number in range(101)]
    )


def test_nothing_told_is_no_call() -> None:
    calls = Calls()
    events.write(calls, "run", [])
    assert calls.sizes == []


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def run(client: Any, uri: str) -> str:
    experiment = client.create_experiment("tests", artifact_location=store.artifact_location(uri))
    return str(client.create_run(experiment).info.run_id)


def test_files_are_copied_and_one_that_is_gone_is_left_out(client: Any, run: str, tmp_path: Path) -> None:
    (tmp_path / "error.png").write_bytes(b"png")
    told = [Artifact(str(tmp_path / "gone.json")), Artifact(str(tmp_path / "error.png"), "figures")]
    events.write(client, run, told)
    assert [file.path for file in client.list_artifacts(run)] == ["figures"]
    assert [file.path for file in client.list_artifacts(run, "figures")] == ["figures/error.png"]


def test_a_checkpoint_becomes_the_next_version_of_its_model_where_it_lies(
    client: Any, run: str, tmp_path: Path
) -> None:
    first = Registered("small", str(tmp_path / "first model"), {"job": "compress", "bytes": "12"})
    second = Registered("small", str(tmp_path / "second"), {"job": "compress"})
    remote = Registered("small", "s3://bucket/model", {"job": "compress"})
    events.write(client, run, [first])
    events.write(client, run, [second, remote])
    versions = sorted(client.search_model_versions("name='small'"), key=lambda version: int(version.version))
    assert [(int(found.version), found.source, found.tags, found.run_id) for found in versions] == [
        (1, (tmp_path / "first model").as_uri(), first.tags, run),
        (2, (tmp_path / "second").as_uri(), second.tags, run),
        (3, "s3://bucket/model", remote.tags, run),
    ]


def test_what_is_told_once_more_makes_no_second_version(client: Any, run: str, tmp_path: Path) -> None:
    told = [Registered("small", str(tmp_path), {"seconds": "1.5"})]
    events.write(client, run, told)
    events.write(client, run, told)
    assert len(client.search_model_versions("name='small'")) == 1
    events.write(client, run, [Registered("small", str(tmp_path), {"seconds": "2.5"})])
    assert len(client.search_model_versions("name='small'")) == 2
