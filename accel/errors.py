"""UserError, which every mistake of a user raises, a check of options, and a test for errors of a full disk."""

import errno


class UserError(ValueError):
    """A mistake of the user; its message is one line that names the wrong value and what would be accepted."""


def check_fields(owner: object, *fields: tuple[str, bool, str]) -> None:
    """UserError for the first wrong field of an object. fields: name, whether its value is right, what is expected."""
    for name, valid, expected in fields:
        if not valid:
            raise UserError(f"{name}={getattr(owner, name)} is wrong: expected {expected}")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error reports that the disk, or the user's quota on it, is full."""
    code = getattr(error, "errno", None)
    # safetensors and sqlite quote the operating system's error in the text of their own.
    messages = ("No space left", "os error 28", "database or disk is full")
    return code in (errno.ENOSPC, errno.EDQUOT) or any(message in str(error) for message in messages)
