"""The one exception that a user's mistake raises, and what a full disk looks like."""

import errno


class UserError(ValueError):
    """A mistake of the caller's: one line that names the wrong value and what would be right."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no space is left, on the disk or of the user's share of it."""
    number = getattr(error, "errno", None)
    # safetensors and sqlite report the operating system's error inside their own.
    texts = ("No space left", "os error 28", "database or disk is full")
    return number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in texts)
