"""Logs of a run: on the terminal, and in a file of its folder."""

import logging
import sys
from datetime import datetime
from pathlib import Path

from hasten.accel.errors import UserError, is_disk_full
from hasten.cluster.storage.naming import as_given

LOG_FILE = "hasten.log"
# Tracebacks go to the log file alone: on the terminal a user's mistake is one line.
_TRACEBACKS = logging.getLogger("hasten.traceback")
_HANDLERS: list[logging.Handler] = []


class _Terminal(logging.Handler):
    """Writes log lines to standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        line = self.format(record)
        if tqdm is None:
            print(line, file=sys.stderr)
        else:
            tqdm.tqdm.write(line, file=sys.stderr)


class _File(logging.FileHandler):
    """Writes log lines to a file; lines for which the disk has no space are lost, without a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if error is None or not is_disk_full(error):
            super().handleError(record)


class _AsGiven(logging.Formatter):
    """Formats log lines, with the user's URIs in place of local paths."""

    def format(self, record: logging.LogRecord) -> str:
        return str(as_given(super().format(record)))


def log_to_terminal() -> None:
    """Log hasten from level INFO and libraries from WARNING to the terminal; closes the log of an earlier run."""
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
    """Default folder of a run that starts now, relative to the current folder."""
    # Milliseconds, because a script may start several runs in one second.
    return str(Path("runs", job, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]))


def log_to_folder(folder: Path) -> None:
    """From now on log, tracebacks included, to the log file in a run's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _File(folder / LOG_FILE, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    _add(handler, "%(asctime)s %(levelname)s %(name)s: %(message)s", logging.getLogger(), _TRACEBACKS)


def log_traceback(error: BaseException) -> None:
    """Write the traceback of an error to the run's log file, if there is one already; at most once per error."""
    if _TRACEBACKS.handlers and not getattr(error, "is_logged", False):
        _TRACEBACKS.error("the run failed", exc_info=error)
        error.is_logged = True  # type: ignore[attr-defined]
