"""A run's folder and its logs: made when work starts, so that a mistake in the options leaves nothing behind."""

import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.cluster.storage.naming import as_given

LOG_FILE = "hasten.log"
# Written to the log file alone: a user's mistake is one line on the terminal.
_TRACEBACKS = logging.getLogger("hasten.traceback")
_HANDLERS: list[logging.Handler] = []


class _Terminal(logging.Handler):
    """Log lines on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        line = self.format(record)
        if tqdm is None:
            print(line, file=sys.stderr)
        else:
            tqdm.tqdm.write(line, file=sys.stderr)


class _AsGiven(logging.Formatter):
    """Lines that name files as the user did."""

    def format(self, record: logging.LogRecord) -> str:
        return str(as_given(super().format(record)))


def log_to_terminal() -> None:
    """Show what hasten logs from level INFO, and what libraries log from WARNING; ends an earlier run's logs."""
    while _HANDLERS:
        earlier = _HANDLERS.pop()
        for logger in (logging.getLogger(), _TRACEBACKS):
            logger.removeHandler(earlier)
        earlier.close()
    logging.getLogger("hasten").setLevel(logging.INFO)
    _TRACEBACKS.propagate = False
    _add(_Terminal(), "%(message)s", logging.getLogger())


def _add(handler: logging.Handler, form: str, *loggers: logging.Logger) -> None:
    handler.setFormatter(_AsGiven(form))
    _HANDLERS.append(handler)
    for logger in loggers:
        logger.addHandler(handler)


def default_folder(job: str) -> str:
    """Folder, relative to the current one, of a run that starts now."""
    # Milliseconds, because a script may start several runs in one second.
    return str(Path("runs", job, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]))


def execute(job: str, name: str | None, schema: Any, config: Any) -> str | None:
    """Run a job, or the benchmark called `name`; path or URI of its report, None where it has none.

    schema: of the options. Those that are URIs are local paths to the job.
    """
    from importlib import import_module

    from hasten.jobs.common.storage import local_paths

    module = import_module(f"hasten.jobs.bench.{name}" if name else f"hasten.jobs.{job}.run")
    with local_paths(schema, config) as local:
        report = module.run(local)
        return None if report is None else str(as_given(str(report)))


def start(config: Any) -> Path:
    """Make config.run_dir with config.yaml and the log file in it, and return it.

    A job calls this once, after everything that the user may have got wrong was checked.
    """
    from omegaconf import OmegaConf

    from hasten.jobs.cli.compose import plain

    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(config))), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    log_to_folder(folder)
    return folder


def log_to_folder(folder: Path) -> None:
    """Write what is logged from here on, tracebacks too, to the log file in a run's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    _add(handler, "%(asctime)s %(levelname)s %(name)s: %(message)s", logging.getLogger(), _TRACEBACKS)


def tracked(config: Any, title: str, run_dir: Path) -> Any:
    """The run's Tracker, by its options; title: of the job, for the name of the MLflow run."""
    from hasten.cluster.tracking.tracker import Tracker

    tracking = config.tracking
    return Tracker(
        tracking.uri,
        tracking.experiment,
        tracking.name or f"{title}-{run_dir.name}",
        run_dir,
        system_seconds=tracking.system_seconds,
        register=tracking.register,
    )


def log_traceback(error: BaseException) -> None:
    """Put the traceback of an error into the run's log file, once, if the run has one by now."""
    if _TRACEBACKS.handlers and not getattr(error, "is_logged", False):
        _TRACEBACKS.error("the run failed", exc_info=error)
        error.is_logged = True  # type: ignore[attr-defined]
