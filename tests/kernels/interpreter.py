"""Triton's interpreter, faster: it searches Triton's modules for builtins once, not in every call of a function."""

import inspect
from typing import Any


def remember_builtins() -> None:
    """Let `_patch_builtin` remember the names that it replaces; versions of Triton without it stay as they are.

    The interpreter replaces them in every call of a kernel or of a function that a kernel calls, and so looks at the
    same thousand members each time, which is a quarter of its run time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_builtin") or not hasattr(interpreter, "_patch_attr"):
        return
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
