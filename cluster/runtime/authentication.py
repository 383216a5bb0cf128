"""Ray's authentication token: where it is read from, and the error messages if a cluster rejects it."""

import os
import secrets
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_FILE = "RAY_AUTH_TOKEN_PATH"


def use_token() -> bool:
    """Make Ray's clients in this process send the token; returns whether there is one and RAY_AUTH_MODE allows it.

    Without RAY_AUTH_MODE=token, Ray sends no token to an explicit address.
    """
    if os.environ.get(_MODE, "token") != "token" or not _has_token():
        return False
    os.environ[_MODE] = "token"
    if "ray" in sys.modules:
        # Ray read its environment when it was imported: make it read it again, as ray.init does.
        raylet: Any = import_module("ray._raylet")
        raylet.Config.initialize("")
    return True


def make_token() -> None:
    """Make a token for a cluster that this process starts, if Ray could not write one to the home folder."""
    if os.environ.get(_MODE, "token") != "token" or _has_token():
        return
    folder = _default_file().parent
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK | os.X_OK):
        os.environ[_TOKEN] = secrets.token_hex(32)


def refusal(cluster: str) -> UserError:
    """The error for a cluster that requires a token and did not accept the request."""
    remedy = (
        f"put the cluster's token (`ray get-auth-token` prints it there) into {_default_file()}, "
        f"into a file that {_FILE} names, or into {_TOKEN}"
    )
    if os.environ.get(_MODE, "token") != "token":
        return UserError(f"{cluster} wants a token, but {_MODE}={os.environ[_MODE]}: set {_MODE}=token")
    if not _has_token():
        missing = (
            f"{_FILE}={os.environ[_FILE]} is no file with a token in it" if _FILE in os.environ else "there is none"
        )
        return UserError(f"{cluster} wants a token, and {missing}: {remedy}")
    if os.environ.get(_TOKEN):
        return UserError(f"{cluster} refuses the token of {_TOKEN}: {remedy}")
    file = f"the file that {_FILE}={os.environ[_FILE]} names" if _FILE in os.environ else f"the file {_default_file()}"
    return UserError(f"{cluster} refuses the token of {file}: {remedy}")


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _has_token() -> bool:
    if os.environ.get(_TOKEN):
        return True
    try:
        return bool(Path(os.environ.get(_FILE) or _default_file()).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False
