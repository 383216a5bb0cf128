"""Ray's token: where it is looked for, and what to say where a cluster refuses it."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_FILE = "RAY_AUTH_TOKEN_PATH"


def use_token() -> bool:
    """Have Ray's clients in this process send the token; returns whether there is one and RAY_AUTH_MODE allows it.

    Ray sends none to an address that was named, unless RAY_AUTH_MODE=token.
    """
    if os.environ.get(_MODE, "token") != "token" or not _there():
        return False
    os.environ[_MODE] = "token"
    if "ray" in sys.modules:
        # Ray has read its environment when it was imported, and does the same in ray.init.
        raylet: Any = import_module("ray._raylet")
        raylet.Config.initialize("")
    return True


def refusal(cluster: str) -> UserError:
    """What to say where a cluster wants a token and does not take what it was sent."""
    right = (
        f"put the cluster's token (`ray get-auth-token` prints it there) into {_default()}, "
        f"into a file that {_FILE} names, or into {_TOKEN}"
    )
    if os.environ.get(_MODE, "token") != "token":
        return UserError(f"{cluster} wants a token, but {_MODE}={os.environ[_MODE]}: set {_MODE}=token")
    if not _there():
        named = f"{_FILE}={os.environ[_FILE]} is no file with a token in it" if _FILE in os.environ else "there is none"
        return UserError(f"{cluster} wants a token, and {named}: {right}")
    if os.environ.get(_TOKEN):
        return UserError(f"{cluster} refuses the token of {_TOKEN}: {right}")
    held = f"the file that {_FILE}={os.environ[_FILE]} names" if _FILE in os.environ else f"the file {_default()}"
    return UserError(f"{cluster} refuses the token of {held}: {right}")


def _default() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _there() -> bool:
    if os.environ.get(_TOKEN):
        return True
    try:
        return bool(Path(os.environ.get(_FILE) or _default()).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False
