"""A new kind of level with a method family of its own: one new file is enough, and no other code names it."""

import sys
from textwrap import dedent

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels import kinds
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import level_kinds, make_levels, parse_level
from tests.compression import local
from tests.models import tiny

MODULE = '''
    """Float8 without scales."""
    from dataclasses import dataclass
    import torch
    from hasten.accel.compression.levels.base import Level, StoredTensor
    from hasten.accel.compression.method import Method
    from hasten.accel.compression.result import Result

    @dataclass(frozen=True)
    class Float8Weight:
        values: torch.Tensor

        @property
        def bits(self):
            return 8 * self.values.numel()

        def rows(self, start, stop):
            return Float8Weight(self.values[start:stop])

        @classmethod
        def join(cls, parts):
            return cls(torch.cat([part.values for part in parts]))

    @dataclass(frozen=True)
    class Cast(Method[None]):
        def prepare(self, hessian):
            return None

    @dataclass(frozen=True)
    class Float8Level(Level):
        examples = ("f8",)
        family = Cast

        @classmethod
        def parse(cls, name):
            return cls() if name == "f8" else None

        @property
        def name(self):
            return "f8"

        def stored_bits(self, rows, columns, itemsize):
            return 8 * rows * columns

        def stored_tensors(self, rows, columns, dtype):
            return [StoredTensor("values", torch.uint8, (rows, columns))]

        def pack(self, weight):
            return {"values": weight.values.view(torch.uint8)}

        def unpack(self, stored):
            return stored["values"].view(torch.float8_e4m3fn).bfloat16()

        def facts(self, weight):
            return {"bits": 8}

        def default_method(self):
            return Cast()

        def without_statistics(self, method):
            return method, "cast"

        def make(self, method, weight, prepared):
            values = weight.to(torch.float8_e4m3fn)
            error = (weight.float() - values.float()).square().sum(1)
            return Result(Float8Weight(values), error, weight.float().square().sum(1))
'''
TOKENS = tiny.tokens(8, 16)


@pytest.fixture
def new_kind(tmp_path, monkeypatch):
    """The module, made discoverable as if it were in the folder of kinds."""
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "cast8.py").write_text(dedent(MODULE))
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path / "kinds")])
    level_kinds.cache_clear()
    yield
    level_kinds.cache_clear()
    sys.modules.pop(f"{kinds.__name__}.cast8")


def test_one_new_file_is_a_level_of_databases_and_checkpoints(new_kind, tmp_path):
    source = tiny.save(tmp_path / "model", "llama", dtype=torch.bfloat16)
    levels = make_levels([3], [32], True, extra=["f8"])
    chosen = local.settings(source, tmp_path / "levels", levels=levels, level=levels[0])
    local.compress(chosen, TOKENS)
    database = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    assert database.levels == ["w3g32", "f8"]
    local.compress(local.settings(source, tmp_path / "out", level=parse_level("f8")), TOKENS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for groups in database.layer_groups:
        for group in groups:
            for layer in group.layers:
                facts = database.facts(layer.name)["f8"]
                assert (facts["method"], facts["bits_per_weight"]) == ("Cast", 8)
                assert torch.equal(loaded.get_submodule(layer.name).weight, database.weight(layer.name, "f8"))
