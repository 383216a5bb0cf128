"""Fingerprint of a run's code: a digest of the source of every module that its methods import.

A resumed run must compute with the same code as the run before, but changes of methods that it does not use are
allowed. Modules are found by static analysis of imports, including those inside functions, so no module is imported.
An argument of `import_module` is followed only where it is a constant: a method that is chosen by name is passed as an
object, and the analysis starts at that object's modules.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import PurePosixPath
from types import ModuleType
from typing import Protocol, runtime_checkable

_PACKAGE = __name__.partition(".")[0]
# Costs that methods state affect dry runs, but no results.
_PLANNING = f"{_PACKAGE}.accel.costs"
# Native sources that a kernel's module names and compiles, and the headers that they include by relative paths.
_NATIVE = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', re.MULTILINE)
_DIGITS = 16


@runtime_checkable
class _Loader(Protocol):
    """The common interface of importlib's loaders for files and for zip archives."""

    def get_data(self, path: str) -> bytes: ...


@dataclass(frozen=True)
class _Module:
    """A module. digest: of its source and of the native sources that it names. imports: names that it may import."""

    digest: str
    imports: frozenset[str]


def code_fingerprint(*roots: object) -> dict[str, str]:
    """Digests, 16 hexadecimal digits each, of all modules that roots depend on, sorted by module name.

    roots: modules, classes, methods and other dataclasses, or collections of them; None is ignored. The search starts
    at the modules that define an object's class, its bases, and the objects in its fields. It follows every import
    within hasten, and, for a class from another package, within that package, too. Parent packages of a module are
    included, because importing the module runs them.
    """
    return dict(_reachable(frozenset(name for root in roots for name in _defined_in(root))))


@cache
def _reachable(names: frozenset[str]) -> dict[str, str]:
    packages = {_PACKAGE, *map(_top, names)}
    digests: dict[str, str] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in digests or _top(name) not in packages or f"{name}.".startswith(f"{_PLANNING}."):
            continue
        module = _read(name)
        if module is not None:
            digests[name] = module.digest
            pending += module.imports
    return dict(sorted(digests.items()))


def _defined_in(root: object) -> Iterator[str]:
    """Names of the modules that define an object's class, its bases, and the objects in its fields."""
    if isinstance(root, ModuleType):
        yield root.__name__
    elif isinstance(root, type):
        yield root.__module__
    elif isinstance(root, Mapping):
        yield from _defined_in(tuple(root.values()))
    elif isinstance(root, (list, tuple, set, frozenset)):
        for value in root:
            yield from _defined_in(value)
    elif is_dataclass(root):
        # Bases from torch and the standard library have versions of their own.
        packages = (_PACKAGE, _top(type(root).__module__))
        yield from _classes(root, packages)
        for field in fields(root):
            yield from _defined_in(getattr(root, field.name))
    elif _top(type(root).__module__) == _PACKAGE:
        yield from _classes(root, (_PACKAGE,))


def _classes(root: object, packages: Collection[str]) -> Iterator[str]:
    """Modules of an object's class and of its bases that are in the given packages."""
    yield from (cls.__module__ for cls in type(root).__mro__ if _top(cls.__module__) in packages)


def _top(name: str) -> str:
    """Package at the top of a module's name."""
    return name.partition(".")[0]


def _read(name: str) -> _Module | None:
    """The module of a name; None where the name is not a module, but, for example, a class imported from one."""
    spec = _find(name)
    if spec is None or not isinstance(spec.loader, _Loader) or spec.origin is None:
        return None
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    return _parse(name, package, spec.loader, spec.origin)


# Methods of one process share most of their modules.
@cache
def _parse(name: str, package: str, loader: _Loader, origin: str) -> _Module:
    source = loader.get_data(origin)
    digest = hashlib.sha256(source)
    imports = set(_parents(name))
    if origin.endswith(".py"):
        tree = ast.parse(source)
        imports |= set(_imports(tree.body, package))
        for file, content in sorted(_native_sources(tree, loader, _folder(origin)).items()):
            digest.update(b"\0" + file.encode() + b"\0" + content)
    return _Module(digest.hexdigest()[:_DIGITS], frozenset(imports))


def _find(name: str) -> ModuleSpec | None:
    """Spec of a module, as the import system would find it, but without importing its parent packages."""
    top, *inner = name.split(".")
    loaded = sys.modules.get(top)
    # A loaded package may have extended its path, as hasten does in a checkout.
    spec = PathFinder.find_spec(top) if loaded is None else loaded.__spec__
    if not inner:
        return spec
    path = getattr(loaded, "__path__", None) or (spec and spec.submodule_search_locations)
    for part in inner:
        if not path:
            return None
        top = f"{top}.{part}"
        spec = PathFinder.find_spec(top, list(path))
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _parents(name: str) -> Iterator[str]:
    """Parent packages of a module, which run when it is imported."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))


def _imports(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """Names that code in a package may import, at its top or inside functions; not all of them are modules."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module, node.level, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _imports(node.orelse, package)
        else:
            if isinstance(node, ast.Call):
                yield from _dynamic(node, package)
            yield from _imports(ast.iter_child_nodes(node), package)


def _absolute(module: str | None, level: int, package: str) -> str:
    """Name of the module that `from ..module import` means in a package."""
    if not level:
        return module or ""
    base = package.split(".")[: len(package.split(".")) - (level - 1)]
    return ".".join([*base, *([module] if module else [])])


def _is_type_checking(test: ast.expr) -> bool:
    """Whether a condition is TYPE_CHECKING, so that its imports do not happen at run time."""
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else None
    return name == "TYPE_CHECKING"


def _dynamic(call: ast.Call, package: str) -> Iterator[str]:
    """Module in a call of import_module or __import__, if the argument is a constant."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if called not in ("import_module", "__import__") or not call.args:
        return
    name = call.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        level = len(name.value) - len(name.value.lstrip("."))
        yield _absolute(name.value.lstrip(".") or None, level, package)


def _native_sources(tree: ast.AST, loader: _Loader, folder: str) -> dict[str, bytes]:
    """Native sources that a module names, and those that they include, by path relative to the module's folder."""
    pending = [path for node in ast.walk(tree) for path in _paths(node)]
    sources: dict[str, bytes] = {}
    while pending:
        path = pending.pop()
        if path in sources or not path.endswith(_NATIVE):
            continue
        try:
            sources[path] = loader.get_data(f"{folder}/{path}")
        except OSError:
            continue  # a system header, or not a file
        included = (name.decode(errors="replace") for name in _INCLUDE.findall(sources[path]))
        pending += [str(PurePosixPath(path).parent / name) for name in included]
    return sources


def _paths(node: ast.AST) -> Iterator[str]:
    """Path in a string constant, or the constant end of an expression such as `folder / "c" / "name.c"`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.BinOp) and isinstance(inner.right, ast.Constant):
            parts.insert(0, str(inner.right.value))
            inner = inner.left
        yield "/".join(parts)


def _folder(origin: str) -> str:
    return origin.replace("\\", "/").rpartition("/")[0]
