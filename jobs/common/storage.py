"""Options that are URIs: jobs work on local copies, and outputs are uploaded to the store.

Inputs are downloaded before the job starts. Outputs are written to a folder below `cache`: files that the store already
has are downloaded first; finished files are uploaded every minute and at the end, also when the run fails.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hasten.accel.errors import UserError
from hasten.cluster.storage.naming import as_given, called
from hasten.cluster.storage.remote import in_place, is_uri, localized
from hasten.jobs.cli.options import options, set_value, value_at
from hasten.jobs.common.logs import log_traceback
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.schema import Run
from hasten.kernels.cache import default_cache

if TYPE_CHECKING:
    from hasten.cluster.storage.mirror import Mirror

C = TypeVar("C", bound=Run)

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_SENDS = 60.0
_MEGABYTE = 10**6


@contextmanager
def local_paths(schema: type[Run], config: C) -> Iterator[C]:
    """Context with a config that has local paths in place of URIs; on exit the outputs are uploaded.

    config.yaml, report and messages still name the URIs. After a successful run no local copies of outputs remain;
    after a failed one, those that are not uploaded yet. UserError, before anything starts, if an input cannot be copied
    or an output cannot be written to.
    """
    uris = _uris(schema, config)
    if not uris:
        yield config
        return
    # The module imports torch, which runs without URIs need not wait for.
    from hasten.cluster.storage.mirror import Mirror

    cache = _cache(config.cache_folder)
    local = copy.deepcopy(config)
    names: dict[Path, str] = {}
    mirrors: dict[str, Mirror] = {}
    with ExitStack() as stack:
        for key, (uri, kind) in uris.items():
            path = in_place(uri)
            if path is None and kind == "in":
                path = copied(key, uri, config.cache_folder)
            elif path is None:
                mirrors[key] = Mirror(uri, cache, key)
                stack.enter_context(mirrors[key].held())
                path = mirrors[key].path
            names[path] = uri
            set_value(local, key, str(path))
        for key, mirror in mirrors.items():
            with _progress(f"fetch {key}") as progress:
                mirror.fetch(progress)
        stack.enter_context(called(names))
        try:
            with _sending(mirrors):
                yield local
        except BaseException as error:
            _failed(error, mirrors)
            raise
        _send(mirrors)


def copied(key: str, uri: str, cache: str | None) -> Path:
    """Local copy of an input at a URI; key: its option. UserError if it cannot be copied."""
    with _progress(f"copy {key}") as progress:
        return localized(uri, _cache(cache), key, progress)


def _cache(cache: str | None) -> Path:
    return Path(cache) if cache else default_cache()


def _uris(schema: type[Run], config: Run) -> dict[str, tuple[str, str]]:
    """URI and kind (`in`, `out`, `state`) of every option whose value is a URI, by the option's key."""
    uris = {}
    for item in options(schema):
        value = value_at(config, item.key)
        if item.path and isinstance(value, str) and is_uri(value):
            uris[item.key] = (value, item.path)
    return uris


@contextmanager
def _sending(mirrors: "Mapping[str, Mirror]") -> Iterator[None]:
    """Context in which a thread regularly uploads the finished files."""
    if not mirrors:
        yield
        return
    ended = threading.Event()

    def send() -> None:
        warned = False
        while not ended.wait(_SECONDS_BETWEEN_SENDS):
            for mirror in mirrors.values():
                try:
                    mirror.push(final=False)
                except (UserError, OSError) as error:  # the store may be reachable again at the end
                    if not warned:
                        _LOG.warning("%s; the run continues and uploads it at the end", error)
                    warned = True

    thread = threading.Thread(target=send, name="storage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _send(mirrors: "Mapping[str, Mirror]") -> None:
    """Upload all remaining files that can be; raises the UserError of the first output that cannot."""
    refusals = []
    for key, mirror in mirrors.items():
        try:
            with _progress(f"send {key}") as progress:
                mirror.push(progress=progress)
            mirror.discard()
        except (UserError, OSError) as error:
            again = f"what was made lies in {mirror.path}: the same command again sends the rest"
            refusals.append(UserError(f"{error}; {again}"))
    if refusals:
        raise refusals[0]


def _failed(error: BaseException, mirrors: "Mapping[str, Mirror]") -> None:
    """Put URIs into the error's message and upload finished files; after an interrupt by the user only run_dir's."""
    # Ray raises a copy of an actor's exception, whose cause is the exception itself.
    mistake = getattr(error, "cause", None) if isinstance(getattr(error, "cause", None), UserError) else error
    if isinstance(mistake, UserError):
        mistake.args = (as_given(str(mistake)),)
    log_traceback(error)
    for key, mirror in mirrors.items():
        if isinstance(error, KeyboardInterrupt) and key != "run_dir":
            continue
        try:
            mirror.push()
        except (UserError, OSError) as refusal:
            # Log lines have the URI in place of the path itself.
            folder = mirror.path.parent
            _LOG.warning("%s; it lies in %s, and the same command again sends it", refusal, folder)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Context with a progress callback, whose bar appears once the first file was transferred."""
    with ExitStack() as stack:
        bars: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(title, max(1, total // _MEGABYTE), "megabyte")))
            bars[0].update(done // _MEGABYTE)

        yield update
