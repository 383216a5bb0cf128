"""Shared by jobs that compress KV caches: the file of calibrated statistics that a method uses."""

import hashlib
import logging
from pathlib import Path

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.statistics import calibrated_in, file_name, files_of, find, load
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import original_of
from hasten.cluster.storage.naming import as_given

_LOG = logging.getLogger(__name__)
_PROMPT = "prompt"


def chosen_statistics(method: CacheMethod, model: Path, given: str | None) -> Path | None:
    """File or folder of a method's statistics, see find; None where it takes them from the prompt.

    given: the option. UserError where what is given is missing, or is of another method, model or hyper-parameter.
    """
    path = None if given == _PROMPT else find(method, model, None if given is None else Path(given).expanduser())
    if path is None:
        for one in calibrated_in(method):
            _LOG.info("%s takes its statistics from each prompt", type(one).__name__)
        return None
    original = original_of(model)
    models = [Checkpoint(folder).fingerprint() for folder in (model, original) if folder is not None]
    files = files_of(method, path)
    for one in calibrated_in(method):
        file = files.get(file_name(one))
        if file is not None:
            load(one, file, models)
        origin = "each prompt" if file is None else as_given(file)
        _LOG.info("%s takes its statistics from %s", type(one).__name__, origin)
    return path.absolute()


def statistics_fingerprint(method: CacheMethod, path: Path | None) -> str | None:
    """Digest of the files of a method's statistics; None where there are none."""
    files = {} if path is None else files_of(method, path)
    if not files:
        return None
    total = hashlib.sha256()
    for _, file in sorted(files.items()):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]
