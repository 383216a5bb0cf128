"""The hasten command: `hasten JOB [key=value …]`."""

import errno
import os
import sys
from importlib import import_module, metadata
from pathlib import Path

from hasten.accel.errors import UserError, is_disk_full
from hasten.cluster.runtime.session_folders import check_folders
from hasten.jobs.cli.help import command_names, job_help, overview
from hasten.jobs.cli.options import MULTIRUN, nearest, split_plan
from hasten.jobs.common.logs import default_folder, log_to_terminal, log_traceback
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.registry import jobs

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
_HELP = ("-h", "--help", "help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Exit code 0, 1 if points of a sweep failed, 2 for a user's mistake, 3 if a quality gate failed, 130 if interrupted.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        log_traceback(error)
        print(f"hasten: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has closed the pipe (`hasten --help | head`). Python flushes once more at exit: to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("hasten: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_disk_full(error):
            where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
            again = "make space and run the same command again; what is finished is kept"
            print(f"hasten: error: the disk is full{where}: {again}", file=sys.stderr)
            return 2
        refused = _refused(error)
        if refused is not None:
            log_traceback(error)
            print(f"hasten: error: {refused}", file=sys.stderr)
            return 2
        # A bug in hasten: the user sees the traceback and can report it.
        log_traceback(error)
        raise


def _main(words: list[str]) -> int:
    if not words or words[0] in _HELP:
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"hasten {metadata.version('hasten')}")
        return 0
    check_folders()
    if words[0] in command_names():
        return _command(words[0], words[1:])
    job, words = jobs()[_check_name(words[0], "job", [*jobs(), *command_names()])], words[1:]
    asks_help = any(word in _HELP for word in words)
    variants = job.variants
    if variants is not None:
        if words and words[0] not in _HELP and "=" not in words[0]:
            job, words = variants.find(_check_name(words[0], variants.kind, variants.names())), words[1:]
        elif not asks_help:
            raise UserError(variants.missing(job.name))
    if asks_help:
        print(job_help(job))
        return 0
    plans, words = split_plan(words)
    if any(word in MULTIRUN for word in words):
        return _sweep(job, [word for word in words if word not in MULTIRUN])
    if plans:
        from hasten.jobs.dry_run.run import plan_words

        _print_report(plan_words(job.name, words))
        return 0
    return _run(job, words)


def _command(name: str, words: list[str]) -> int:
    try:
        return int(import_module(f"hasten.jobs.cli.commands.{name}").main(words))
    except SystemExit as stop:  # argparse has printed its help
        if stop.code:
            raise
        return 0


def _run(job: Job, words: list[str]) -> int:
    from hasten.jobs.cli.compose import compose
    from hasten.jobs.cli.execute import execute

    config = compose(job.name, job.options, words)
    config.run_dir = config.run_dir or default_folder("/".join(job.words))
    log_to_terminal()
    report, code = execute(job, config)
    _print_report(report)
    return code


def _sweep(job: Job, words: list[str]) -> int:
    from hasten.jobs.sweep.run import run

    log_to_terminal()
    report, code = run(job, words)
    _print_report(report)
    return code


def _print_report(report: Path | str | None) -> None:
    if report is not None:
        sys.stderr.flush()
        print(f"report: {report}", flush=True)


def _check_name(word: str, kind: str, names: list[str]) -> str:
    if word not in names:
        near = nearest(word, names)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"unknown {kind} {word!r}: {hint}")
    return word


def _refused(error: BaseException) -> str | None:
    """One line for a path that cannot be read or written; None for other errors."""
    # Ray raises a copy of an actor's exception, which is its cause.
    refusal = getattr(error, "cause", None) or error
    if isinstance(refusal, RuntimeError) and "home directory" in str(refusal):  # of pathlib
        return "a path that begins with ~ names no user with a home folder: write the whole path"
    if not isinstance(refusal, OSError) or not refusal.filename or refusal.errno not in _REFUSALS:
        return None
    return f"{refusal.filename} cannot be used ({refusal.strerror}): check its permissions, or name another path"


def _one_line(error: UserError) -> str:
    # Ray raises a copy of an actor's exception whose text is the remote traceback; the exception itself is its cause.
    cause = getattr(error, "cause", None)
    return " ".join(str(cause if isinstance(cause, UserError) else error).split())


if __name__ == "__main__":
    sys.exit(main())
