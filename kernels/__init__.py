"""One folder per op: torch reference, Triton kernel or C source, and one dispatch function in its `__init__.py`."""
