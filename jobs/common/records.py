"""The type of a JSON object in memory."""

from typing import Any

# An object of JSON whose keys its writer knows: a report, a row of one, a result.
Record = dict[str, Any]
