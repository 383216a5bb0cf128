"""Shared by jobs that compress KV caches: the file of calibrated statistics that a method uses."""

import hashlib
import logging
from pathlib import Path

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.calibrated import Calibrated
from hasten.accel.cache.statistics import find, load
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import original_of
from hasten.cluster.storage.naming import as_given

_LOG = logging.getLogger(__name__)
_PROMPT = "prompt"


def chosen_statistics(method: CacheMethod, model: Path, given: str | None) -> Path | None:
    """File of a method's statistics; None where it takes them from the prompt.

    given: the option. UserError where what is given is missing, or is of another method, model or hyper-parameter.
    """
    path = None if given == _PROMPT else find(method, model, None if given is None else Path(given).expanduser())
    if path is None:
        if isinstance(method, Calibrated):
            _LOG.info("%s takes its statistics from each prompt", type(method).__name__)
        return None
    original = original_of(model)
    models = [Checkpoint(folder).fingerprint() for folder in (model, original) if folder is not None]
    load(method, path, models)
    _LOG.info("%s takes its statistics from %s", type(method).__name__, as_given(path))
    return path.absolute()


def statistics_fingerprint(path: Path | None) -> str | None:
    """Digest of a file of statistics."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
