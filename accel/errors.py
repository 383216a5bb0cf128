"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake of the caller's: one line that names the wrong value and what would be right."""
