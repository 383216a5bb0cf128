"""The methods of a config group, read from the folder conf/GROUP without importing any of them."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hasten import conf
from hasten.accel.errors import UserError
from hasten.jobs.common.records import Record

CONF = Path(conf.__file__).parent
_FAMILIES = (
    *("quantizer", "column_quantizer", "pruner", "transform", "input_observer"),
    *("level", "allocator", "fitness", "hardware"),
    *("drafter", "verifier", "draft_length", "head", "cache"),
)
_TARGET = re.compile(r"^_target_: *(\S+)\.\w+ *$", re.MULTILINE)
_OR_NONE = " | None"
_SIMPLE = {kind.__name__: kind for kind in (int, float, bool, str)}


@dataclass(frozen=True)
class MethodField:
    """A hyper-parameter. kind: int, float, bool or str, else object.

    default: of the method's file, else of the class, a literal or its source text. optional: None is allowed.
    """

    name: str
    kind: type
    default: object
    optional: bool = False


@dataclass(frozen=True)
class Method:
    """A file of a config group. summary: first sentence of the method's module, or of its class if methods share it."""

    name: str
    summary: str
    fields: tuple[MethodField, ...]


def job_file(job: str) -> Record:
    """Content of conf/JOB.yaml."""
    return yaml.safe_load((CONF / f"{job}.yaml").read_text(encoding="utf-8"))


def families() -> list[str]:
    """Config groups of methods, the folders of conf, in the order of help and documentation; new ones come last."""
    names = sorted(folder.name for folder in CONF.iterdir() if any(folder.glob("*.yaml")))
    return sorted(names, key=lambda name: _FAMILIES.index(name) if name in _FAMILIES else len(_FAMILIES))


def heading(family: str) -> str:
    """Plural of a family's name, for headings."""
    if family == "hardware":
        return family
    return f"{family.replace('_', ' ')}{' functions' if family.endswith('s') else 's'}"


def method_names(group: str) -> list[str]:
    """Names that GROUP= accepts, in order."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def target_of(group: str, name: str) -> str:
    """Import path of the class that a method's file names."""
    return str(yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"])


def name_of(group: str, target: str) -> str:
    """Name of the file that names a class; without such a file, the class's name in lower case."""
    names = (name for name in method_names(group) if target_of(group, name) == target)
    return next(names, target.rpartition(".")[2].lower())


@cache
def method(group: str, name: str) -> Method:
    """An existing method of a group; its module is parsed and not imported."""
    module, _, class_name = target_of(group, name).rpartition(".")
    tree = _parsed(module)
    method_class = _class_of(tree, class_name)
    documented = method_class if method_class is not None and _is_shared(group, module) else tree
    summary = " ".join((ast.get_docstring(documented) or "").partition("\n\n")[0].split()).removesuffix(".")
    fields = () if method_class is None else _fields(module, class_name)
    chosen = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return Method(
        name, summary, tuple(replace(field, default=chosen.get(field.name, field.default)) for field in fields)
    )


def _is_shared(group: str, module: str) -> bool:
    """Whether several methods of a group are classes of one module."""
    texts = [path.read_text(encoding="utf-8") for path in (CONF / group).glob("*.yaml")]
    return sum(match is not None and match[1] == module for match in map(_TARGET.search, texts)) > 1


@cache
def _parsed(module: str) -> ast.Module:
    """Source of a module below the import root."""
    path = CONF.parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _class_of(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _fields(module: str, class_name: str) -> tuple[MethodField, ...]:
    """Hyper-parameters of a class in the order of dataclasses: those of its bases first, with its own defaults."""
    tree = _parsed(module)
    node = _class_of(tree, class_name)
    if node is None:
        return ()
    imported = {
        alias.asname or alias.name: (item.module, alias.name)
        for item in tree.body
        if isinstance(item, ast.ImportFrom) and item.module is not None and item.module.startswith("hasten.")
        for alias in item.names
    }
    fields: dict[str, MethodField] = {}
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0]
        origin = imported.get(name, (module, name))
        fields |= {field.name: field for field in _fields(*origin)}
    return tuple((fields | {field.name: field for field in _own_fields(node)}).values())


def _own_fields(node: ast.ClassDef) -> tuple[MethodField, ...]:
    fields = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                kind = _SIMPLE.get(annotation.removesuffix(_OR_NONE), object)
                optional = annotation.endswith(_OR_NONE)
                fields.append(MethodField(item.target.id, kind, _value(item.value), optional))
    return tuple(fields)


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def build(settings: Record) -> Any:
    """The method that a composed group describes; UserError if it refuses its hyper-parameters."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        # Without _convert_, a list of methods would be passed on as a list of OmegaConf.
        return instantiate(settings, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def build_all(family: str, names: Iterable[str], settings: Record) -> tuple[Any, ...]:
    """The methods of a list, in its order. settings: hyper-parameters by name of a method, see schema.method_list."""
    files = {name: yaml.safe_load((CONF / family / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}
    return tuple(build(files[name] | settings.get(name, {})) for name in files)
