"""Start MLflow's web server on the store of these runs; while it runs, jobs write through it."""

from pathlib import Path

from hasten.accel.errors import UserError
from hasten.jobs.cli.commands._arguments import Parser


def main(words: list[str]) -> int:
    """Exit code of the server, which runs until it is interrupted."""
    parser = Parser("ui", f"{__doc__}\n\nWithout WHERE it is the sqlite file in ./runs.")
    parser.add_argument("where", nargs="?", help="folder of a run or a sweep, a sqlite file, or a tracking URI")
    parser.add_argument("--host", default="127.0.0.1", help="address that the server listens on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port that it listens on (5000)")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    arguments = parser.parse_args(words)

    from hasten.cluster.tracking.server import serve

    return serve(tracking_uri(arguments.where), arguments.host, arguments.port, arguments.open)


def tracking_uri(where: str | None) -> str:
    """URI of the store that a run's or sweep's folder was tracked in, or the URI itself; None is ./runs."""
    from hasten.cluster.tracking import store

    if where is None:
        uri = store.default_uri()
    elif "://" in where or where.startswith("sqlite:"):
        uri = store.absolute(where)
    elif where.endswith(".db"):
        uri = store.absolute(f"sqlite:///{Path(where).absolute()}")
    else:
        uri = _of_folder(Path(where))
    file = store.sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"there are no runs in {file}: start one first, or name its folder or tracking URI")
    return uri


def _of_folder(folder: Path) -> str:
    from hasten.cluster.tracking.environment import tracking_uri as recorded_uri

    uri = recorded_uri(folder)
    if uri is None:
        raise UserError(
            f"{folder} is no folder of a run or a sweep, and no tracking URI such as sqlite:///runs/mlflow.db"
        )
    return uri
