"""Triton's interpreter, faster: without work that it repeats in every call, or whose result it does not read."""

import inspect
from typing import Any


def speed_up() -> None:
    """Change the interpreter in this process; versions of Triton that have not the same parts stay as they are."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        _remember_builtins(interpreter)
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        # Sums of integers are computed again in 64 bits for an assertion that is made with `debug` only.
        object.__setattr__(options, "sanitize_overflow", False)


def _remember_builtins(interpreter: Any) -> None:
    """Search Triton's modules for builtins once.

    The interpreter replaces them in every call of a kernel or of a function that a kernel calls, and looks at the same
    thousand members each time.
    """
    from triton.language.core import is_builtin

    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, *arguments: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            # In a nested call it is replaced already.
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *arguments)

    interpreter._patch_builtin = patch_builtin
