"""Run a job on a Ray cluster and follow its output.

The words after JOB are those of `hasten JOB`. They are checked here, then sent with the code to the cluster,
where the job runs in --workdir. The exit code is the job's, 130 if it was stopped. Ctrl-C leaves the job running.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from hasten.accel.errors import UserError
from hasten.jobs.cli.commands._cluster import cluster_parser, follow
from hasten.jobs.cli.options import MULTIRUN, Option, nearest, options, split_plan
from hasten.jobs.cli.quotes import if_needed, split, verbatim
from hasten.jobs.common.logs import log_to_terminal
from hasten.jobs.common.records import Record
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.options import parse_words


def main(words: list[str]) -> int:
    """Exit code of the job; with --no-wait 0 once the cluster has accepted it."""
    arguments = _parser().parse_args(words)
    job, job_words = _job_and_options(arguments.job, arguments.words)
    workdir = _workdir(arguments.workdir)
    _check(job, job_words)
    command = _remote_words(job, job_words, lambda text: str(Path(workdir, text)))
    from hasten.cluster.submission.code_package import source
    from hasten.cluster.submission.job_server import JobServer

    env = source(arguments.env)
    runtime_env = _runtime_env(arguments.runtime_env)
    log_to_terminal()
    server = JobServer(arguments.address)
    job_id = server.submit(command, workdir, env, runtime_env, arguments.name)
    if arguments.no_wait:
        print(job_id)
        return 0
    print(f"{job_id} submitted to {server.url}: hasten {shlex.join(command)}", file=sys.stderr)
    return follow(server, job_id)


def _parser() -> argparse.ArgumentParser:
    parser = cluster_parser("submit", (__doc__ or "").strip())
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    parser.add_argument(
        "--workdir",
        metavar="PATH",
        help="folder on the cluster that relative paths start from; default: the current one",
    )
    parser.add_argument(
        "--env",
        metavar="tree|installed|none|WHEEL",
        help="code that the job runs: this checkout's files, the installed packages, a wheel, or what the cluster has; "
        "default: what this command runs from",
    )
    parser.add_argument(
        "--runtime-env", metavar="FILE", help="YAML file of Ray's runtime environment: env_vars, pip, …"
    )
    parser.add_argument("--name", metavar="ID", help="the job's id, must be new; default: hasten-JOB-TIME")
    parser.add_argument("job", metavar="JOB", help=f"one of {', '.join(jobs())}")
    parser.add_argument("words", metavar="key=value", nargs=argparse.REMAINDER, help="options of the job; --multirun")
    return parser


def _job_and_options(name: str, words: list[str]) -> tuple[Job, list[str]]:
    """The job, or its variant that the first word names, and the remaining words."""
    if name not in jobs():
        near = nearest(name, jobs())
        raise UserError(
            f"unknown job {name!r}: " + (f"did you mean {near}?" if near else f"there are {', '.join(jobs())}")
        )
    job = jobs()[name]
    if job.variants is None:
        return job, words
    if not words or words[0] not in job.variants.names():
        raise UserError(job.variants.missing(f"submit {name}"))
    return job.variants.find(words[0]), words[1:]


def _check(job: Job, words: list[str]) -> None:
    """UserError if the job itself would refuse its words."""
    from hasten.jobs.cli.compose import compose

    submit_options = {word.partition("=")[0] for word in _parser()._option_string_actions}
    for word in words:
        if word.partition("=")[0] in submit_options:
            raise UserError(f"{word} belongs to submit: it comes before {job.name}")
    is_plan, words = split_plan(words)
    if set(MULTIRUN) & set(words):
        from hasten.jobs.sweep.run import check

        check(job, [word for word in words if word not in MULTIRUN])
        return
    if is_plan:
        _, words = parse_words(words)
    compose(job.name, job.options, words)


def _remote_words(job: Job, words: list[str], absolute: Callable[[str], str]) -> list[str]:
    """Words of `hasten` on the cluster, with absolute paths and an address, so that the job joins that cluster."""
    known = {item.key: item for item in options(job.options)}
    is_sweep = bool(set(MULTIRUN) & set(words))
    sent = [_absolute(word, known, is_sweep, absolute) for word in words]
    keys = {word.partition("=")[0] for word in words}
    if is_sweep:
        if not {"sweep.address", "address"} & keys:
            sent.append("sweep.address=auto")
    elif "address" in known and "address" not in keys:
        sent.append("address=auto")
    return [*job.words, *sent]


def _absolute(word: str, known: dict[str, Option], is_sweep: bool, absolute: Callable[[str], str]) -> str:
    key, sign, _ = word.partition("=")
    item = known.get(key)
    if item is None or item.path is None or not sign:
        return word
    if not is_sweep:
        path = split(word)[1]
        return verbatim(key, absolute(path)) if _is_relative(path, item) else word
    # In a sweep one option may have several paths.
    from hasten.jobs.sweep.dimensions import read

    words = read([word], ())
    paths = words.dimensions[0].values if words.dimensions else (split(word)[1],)
    if paths is None or not any(_is_relative(path, item) for path in paths):
        return word
    return f"{key}={','.join(if_needed(absolute(path) if _is_relative(path, item) else path) for path in paths)}"


def _is_relative(text: str, item: Option) -> bool:
    if not text or "://" in text or text[0] in "/~" or (item.optional and text.lower() in ("null", "none")):
        return False
    # An input may be a name: embedded:target, library, hub:NAME.
    return item.path != "in" or Path(text).exists()


def _workdir(workdir: str | None) -> str:
    """Absolute path, with symbolic links not resolved: they are the cluster's."""
    if workdir is None:
        return str(Path.cwd())
    if not Path(workdir).is_absolute():
        raise UserError(f"--workdir {workdir} is wrong: expected an absolute path, of a folder on the cluster")
    return workdir


def _runtime_env(file: str | None) -> Record:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not _are_texts(content.get("env_vars", {})):
        raise UserError(
            f"--runtime-env {file} is wrong: expected keys of Ray's runtime environment, env_vars with texts"
        )
    return content


def _are_texts(env_vars: object) -> bool:
    return isinstance(env_vars, dict) and all(isinstance(text, str) for text in _flat(env_vars.items()))


def _flat(pairs: Iterable[tuple[object, object]]) -> Iterable[object]:
    return (item for pair in pairs for item in pair)
