"""Which changes of a package's sources change a fingerprint, and which do not."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.level import make_levels
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.outputs import code_fingerprint as module
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import ResumableFolder

TREE = {
    "made_up/__init__.py": "",
    "made_up/methods/__init__.py": "",
    "made_up/methods/own.py": """
        from dataclasses import dataclass
        from typing import TYPE_CHECKING
        import json
        from .. import kernels
        from made_up.shared import helper
        if TYPE_CHECKING:
            from made_up import types_alone
        @dataclass(frozen=True)
        class Own:
            inner: object = None
            def run(self):
                from made_up.lazy import late
                from importlib import import_module
                import_module("made_up.dynamic")
                import_module(f"made_up.methods.{self.inner}")
    """,
    "made_up/methods/other.py": """
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class Other:
            number: int = 1
    """,
    "made_up/shared.py": "from made_up.deeper import constant\nhelper = constant",
    "made_up/deeper.py": "constant = 1",
    "made_up/lazy.py": "late = 1",
    "made_up/dynamic.py": "",
    "made_up/types_alone.py": "",
    "made_up/kernels/__init__.py": "from made_up.kernels import op",
    "made_up/kernels/op.py": """
        from pathlib import Path
        SOURCE = Path(__file__).with_name("product.c")
        INNER = Path(__file__).parent / "c" / "sums.c"
    """,
    "made_up/kernels/product.c": '#include <math.h>\n#include "product.h"\n',
    "made_up/kernels/product.h": "#define WIDTH 32\n",
    "made_up/kernels/c/sums.c": '  # include "sums.h"\n',
    "made_up/kernels/c/sums.h": "",
    "made_up/kernels/unused.c": "",
}
OWN = {
    "made_up",
    "made_up.deeper",
    "made_up.dynamic",
    "made_up.kernels",
    "made_up.kernels.op",
    "made_up.lazy",
    "made_up.methods",
    "made_up.methods.own",
    "made_up.shared",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An importable package that no cache knows."""
    for name, text in TREE.items():
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        indented = text.startswith("\n")
        file.write_text("\n".join(line[8:] for line in text.split("\n")) if indented else text)
    monkeypatch.syspath_prepend(tmp_path / "tree")
    forget()
    yield tmp_path / "tree"
    forget()


def forget():
    """Forget all cached modules and fingerprints, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]
    module._reachable.cache_clear()
    module._parse.cache_clear()
    importlib.invalidate_caches()


def own(inner=None):
    """Fingerprint of a method of the package, computed without caches."""
    forget()
    return code_fingerprint(importlib.import_module("made_up.methods.own").Own(inner))


def test_the_fingerprint_has_all_modules_that_a_method_imports_and_no_others(tree):
    assert set(own()) == OWN


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("methods/own.py", "methods.own"),
        ("shared.py", "shared"),
        ("deeper.py", "deeper"),
        ("lazy.py", "lazy"),
        ("dynamic.py", "dynamic"),
        ("methods/__init__.py", "methods"),
        ("kernels/op.py", "kernels.op"),
        ("kernels/product.c", "kernels.op"),
        ("kernels/product.h", "kernels.op"),
        ("kernels/c/sums.c", "kernels.op"),
        ("kernels/c/sums.h", "kernels.op"),
        ("methods/other.py", None),
        ("types_alone.py", None),
        ("kernels/unused.c", None),
        ("methods/new.py", None),
    ],
)
def test_a_change_alters_the_fingerprint_where_the_method_imports_the_module(tree, file, changed):
    before = own()
    path = tree / "made_up" / file
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    after = own()
    differing = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert differing == ({f"made_up.{changed}"} if changed else set())


def test_a_method_in_a_field_of_another_is_in_its_fingerprint(tree):
    other = importlib.import_module("made_up.methods.other").Other()
    assert set(own(other)) == {*OWN, "made_up.methods.other"}
    assert set(own([{"name": other}])) == {*OWN, "made_up.methods.other"}


def test_a_zip_archive_and_a_folder_have_the_same_fingerprint(tree, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree))
    unpacked = own()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "code.zip"), *(path for path in sys.path if path != str(tree))])
    assert own() == unpacked
    assert "code.zip" in importlib.import_module("made_up").__file__


@dataclass(frozen=True)
class OfAnotherPackage(GPTQ):
    """A quantizer that a user keeps outside hasten, on top of one inside."""


def settings(**changes):
    values = {"quantizer": GPTQ(), "level": GridLevel(Scheme(4, 32)), "format": CompressedTensors()}
    return Settings(Path("model"), Path("out"), **(values | changes))


def names(**changes):
    """Last parts of the names of the modules in the fingerprint of some settings."""
    return {name.rpartition(".")[2] for name in settings(**changes).code()}


def test_the_fingerprint_of_a_compression_has_its_methods_and_the_pass():
    found = names()
    assert {"gptq", "grid", "factor", "solve", "shard", "statistics", "architecture", "settings"} <= found
    assert {"pack_quantized", "dequantize", "triton_kernel"} <= found
    assert not {"baq", "sparsegpt", "wanda", "evopress", "costs", "estimate"} & found
    # Experts that see few tokens are rounded to nearest, so this counts in every run; gptq does not.
    assert "gptq" not in names(quantizer=RoundToNearest())
    assert "gptq" in names(quantizer=OfAnotherPackage())


def test_the_fingerprint_of_a_database_has_the_methods_of_its_levels():
    pruned = make_levels([], [32], False, [0.5])
    assert "wanda" in names(levels=pruned, pruner=Wanda(), level=pruned[0])
    assert not {"sparsegpt", "gptq"} & names(levels=pruned, pruner=Wanda(), level=pruned[0])
    assert "sparsegpt" in names(levels=pruned, pruner=SparseGPT(), level=pruned[0])
    grids = make_levels([4], [32], False, [])
    assert "wanda" not in names(levels=grids, pruner=Wanda(), level=grids[0])


def test_the_sources_are_found_wherever_hasten_is_and_nothing_heavy_is_imported_for_it(tmp_path):
    """In a copy of the checkout as Ray unpacks a package of code: without pyproject.toml, the folders in hasten."""
    root = Path(module.__file__).parents[2]
    for name in ("accel", "kernels"):
        shutil.copytree(root / name, tmp_path / "hasten" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "hasten" / "__init__.py", tmp_path / "hasten")
    script = """
import sys
from types import ModuleType
from hasten.accel.outputs.code_fingerprint import code_fingerprint
method = ModuleType("hasten.accel.compression.quantizers.gptq")
found = code_fingerprint(method)
assert sorted(found) == list(found) and "hasten.accel.compression.quantizers.grid" in found
assert not {"torch", "numpy"} & set(sys.modules)
print(*(f"{name}={digest}" for name, digest in found.items()), sep="\\n")
"""
    elsewhere = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    here = code_fingerprint(importlib.import_module("hasten.accel.compression.quantizers.gptq"))
    assert dict(line.split("=") for line in elsewhere.stdout.split()) == here


def test_a_folder_of_other_code_is_refused_with_the_modules_that_differ(tmp_path):
    folder = ResumableFolder(tmp_path / "out", tmp_path)
    code = {"hasten.gptq": "1", "hasten.grid": "1", "hasten.solve": "1", "hasten.shard": "1"}
    folder.open({"bits": 4, "code": code}, overwrite=False)
    folder.check({"bits": 4, "code": dict(reversed(code.items()))}, overwrite=False)
    with pytest.raises(UserError, match=r"with other settings \(code of hasten\.gptq\): "):
        folder.check({"bits": 4, "code": code | {"hasten.gptq": "2"}}, overwrite=False)
    with pytest.raises(UserError, match=r"code of hasten\.gptq, hasten\.grid, hasten\.new and 2 more\)"):
        folder.check({"bits": 4, "code": {**dict.fromkeys(code, "2"), "hasten.new": "2"}}, overwrite=False)
    # As a run of an older version recorded it.
    with pytest.raises(UserError, match="code: "):
        folder.check({"bits": 4, "code": "0123"}, overwrite=False)
    folder.release()
