"""Options that are URIs: a job works on local paths, and the store gets what it made.

What a job only reads is copied before it starts; what it makes lies in a folder below `cache`, to which comes first
what the store has of it, and from which is sent what is finished, every minute and at the end, of failed runs, too.
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
    """Config with local paths in place of URIs; when the block is left, what the run made is sent.

    Config, report and messages name the URIs all the same. A run that ended well leaves nothing of its
    outputs here, any other one what is not sent yet. UserError, before anything starts, where an input cannot be
    copied or an output cannot be written to.
    """
    given = _given(schema, config)
    if not given:
        yield config
        return
    # It imports torch, which a run without URIs may do without.
    from hasten.cluster.storage.mirror import Mirror

    cache = _cache(config.cache)
    local = copy.deepcopy(config)
    names: dict[Path, str] = {}
    mirrors: dict[str, Mirror] = {}
    with ExitStack() as stack:
        for key, (uri, kind) in given.items():
            path = in_place(uri)
            if path is None and kind == "in":
                path = copied(key, uri, config.cache)
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
    """Local copy of what a job reads at a URI; key: the option. UserError where it cannot be copied."""
    with _progress(f"copy {key}") as progress:
        return localized(uri, _cache(cache), key, progress)


def _cache(given: str | None) -> Path:
    return Path(given) if given else default_cache()


def _given(schema: type[Run], config: Run) -> dict[str, tuple[str, str]]:
    """URI and kind (`in`, `out`, `state`) by the key of the option; without what is no URI."""
    found = {}
    for item in options(schema):
        value = value_at(config, item.key)
        if item.path and isinstance(value, str) and is_uri(value):
            found[item.key] = (value, item.path)
    return found


@contextmanager
def _sending(mirrors: "Mapping[str, Mirror]") -> Iterator[None]:
    """Send what is finished from time to time, in a thread, while the block runs."""
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
                except (UserError, OSError) as error:  # it may be back at the end
                    if not warned:
                        _LOG.warning("%s; the run goes on, and sends it at the end", error)
                    warned = True

    thread = threading.Thread(target=send, name="storage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _send(mirrors: "Mapping[str, Mirror]") -> None:
    """Send what is not sent yet, all that can be; UserError of the first that cannot."""
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
    """Have the error name URIs, and send what is finished; of a run that the user interrupted its folder alone."""
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
    """A progress bar that begins when the first file has come or gone."""
    with ExitStack() as stack:
        bars: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(title, max(1, total // _MEGABYTE), "megabyte")))
            bars[0].update(done // _MEGABYTE)

        yield update
