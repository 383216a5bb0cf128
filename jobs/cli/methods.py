"""The methods of a config group, read from the folder conf/GROUP without importing any of them."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hasten import conf
from hasten.accel.errors import UserError
from hasten.jobs.common.records import Record

CONF = Path(conf.__file__).parent
_SIMPLE = {kind.__name__: kind for kind in (int, float, bool, str)}


@dataclass(frozen=True)
class MethodField:
    """A hyper-parameter. kind: int, float, bool or str, else object. default: a literal, else its source text."""

    name: str
    kind: type
    default: object


@dataclass(frozen=True)
class Method:
    """A file of a config group, with the first sentence of the method's module."""

    name: str
    summary: str
    fields: tuple[MethodField, ...]


def job_file(job: str) -> Record:
    """Content of conf/JOB.yaml."""
    return yaml.safe_load((CONF / f"{job}.yaml").read_text(encoding="utf-8"))


def method_names(group: str) -> list[str]:
    """Names that GROUP= accepts, in order."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def target_of(group: str, name: str) -> str:
    """Import path of the class that a method's file names."""
    return str(yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"])


@cache
def method(group: str, name: str) -> Method:
    """An existing method of a group; its module is parsed and not imported."""
    module, _, class_name = target_of(group, name).rpartition(".")
    path = CONF.parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    summary = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split()).removesuffix(".")
    fields = next(
        (_fields(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), ()
    )
    return Method(name, summary, fields)


def _fields(node: ast.ClassDef) -> tuple[MethodField, ...]:
    fields = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                fields.append(MethodField(item.target.id, _SIMPLE.get(annotation, object), _value(item.value)))
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
