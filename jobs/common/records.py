"""The type of a JSON object in memory."""

from typing import Any

# A JSON object: a report, a row of one, a result.
Record = dict[str, Any]
