"""UserError, which every mistake of a user raises, and a test for errors of a full disk."""

import errno


class UserError(ValueError):
    """A mistake of the user; its message is one line that names the wrong value and what would be accepted."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error reports that the disk, or the user's quota on it, is full."""
    code = getattr(error, "errno", None)
    # safetensors and sqlite quote the operating system's error in the text of their own.
    messages = ("No space left", "os error 28", "database or disk is full")
    return code in (errno.ENOSPC, errno.EDQUOT) or any(message in str(error) for message in messages)
