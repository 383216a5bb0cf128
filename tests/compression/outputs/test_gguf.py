import pytest
import torch

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.assemble import mixed_gguf, write_mixed
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.outputs import gguf as module
from hasten.accel.compression.outputs.gguf import FILE, GgufOptions
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.costs.files import gguf_files
from hasten.accel.errors import UserError
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.checkpoint import Checkpoint, resolve
from tests.compression import local
from tests.models import tiny


@pytest.fixture
def source(tmp_path):
    return tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)


def settings(source, output, **changes):
    return local.settings(source, output, gguf=GgufOptions(), **{"level": parse_level("q4_0"), **changes})


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the program catches it."""


def test_a_run_that_is_killed_while_it_writes_resumes_to_the_same_bytes(source, tmp_path, monkeypatch):
    tokens = tiny.tokens(4)
    rows = local.compress(settings(source, tmp_path / "whole"), tokens)
    assert {row["type"] for row in rows} == {"q4_0"}
    assert all(row["method"] == "GPTQ" for row in rows)

    def die(*_, **__):
        raise KilledError

    chosen = settings(source, tmp_path / "out")
    # First behind the first block, then in the middle of the assembly.
    with monkeypatch.context() as patched:
        write = module.GgufFolder.write_block
        patched.setattr(
            module.GgufFolder, "write_block", lambda self, block, *rest: die() if block else write(self, block, *rest)
        )
        with pytest.raises(KilledError):
            local.compress(chosen, tokens)
    assert Task(chosen).output.finished == [0]
    with monkeypatch.context() as patched:
        patched.setattr(module, "to_pairs", die)
        with pytest.raises(KilledError):
            local.compress(chosen, tokens)
    assert not (tmp_path / "out" / FILE).exists()
    local.compress(chosen, tokens)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_other_types_of_the_outer_matrices_are_another_run(source, tmp_path):
    chosen = settings(source, tmp_path / "out")
    tokens = tiny.tokens(4)
    local.compress(chosen, tokens)
    other = Task(local.settings(source, tmp_path / "out", level=chosen.level, gguf=GgufOptions("q8_0")))
    with pytest.raises(UserError, match="gguf"):
        other.output.open(other.settings.fingerprint(other.checkpoint, tokens), overwrite=False)


def test_layers_are_calibrated_on_the_weights_that_the_file_holds(source, tmp_path):
    tokens = tiny.tokens(4)
    local.compress(settings(source, tmp_path / "out"), tokens)
    task = Task(settings(source, tmp_path / "out"))
    read = Checkpoint(resolve(str(tmp_path / "out" / FILE)))
    for groups in task.layer_groups:
        for (module_path, read_weight), layer in zip(
            task.output.read_layers(groups), [layer for group in groups for layer in group.layers], strict=True
        ):
            assert module_path == layer.module
            # The run computes in the checkpoint's dtype.
            torch.testing.assert_close(
                read_weight().float(), read.tensor(f"{layer.name}.weight").float(), rtol=2**-8, atol=0
            )


def test_bits_per_weight_count_every_byte_of_the_blocks(source, tmp_path):
    local.compress(settings(source, tmp_path / "out", quantizer=RoundToNearest()), tiny.tokens(4))
    measured = sizes(Checkpoint(tmp_path / "out"))
    assert measured.block_bits_per_weight == 4.5
    size = (tmp_path / "out" / FILE).stat().st_size
    assert measured.disk_bytes == size
    # A plan knows the tensors to the byte, and not the header.
    task = Task(settings(source, tmp_path / "out", quantizer=RoundToNearest()))
    planned = gguf_files(task.architecture, task.layer_groups, GgufOptions())
    assert planned["GGUF file"] == measured.total_bytes
    assert 0 < size - planned["GGUF file"] < 8192


def test_layers_of_a_search_have_types_of_their_own_and_blocks_can_be_dropped(source, tmp_path):
    levels = tuple(map(parse_level, ("q4_0", "q8_0")))
    chosen = local.settings(source, tmp_path / "levels", RoundToNearest(), level=levels[0], levels=levels)
    local.compress(chosen, tiny.tokens(4))
    task = Task(chosen)
    names = [layer.name for layer in task.architecture.linears(1)]
    assigned = {name: "q8_0" if "v_proj" in name else "q4_0" for name in names if "o_proj" not in name}
    output = mixed_gguf(task.architecture, task.output, assigned, tmp_path / "mix", GgufOptions(), {0: {"block"}})
    output.open({}, overwrite=False)
    facts = write_mixed(output, task.output, assigned)
    output.release()
    read = Checkpoint(resolve(str(tmp_path / "mix" / FILE)))
    for name, level in assigned.items():
        stored = read.tensor(f"{name}.weight".replace("layers.1", "layers.0"))
        # The database gives the checkpoint's dtype.
        torch.testing.assert_close(stored.float(), task.output.weight(name, level).float(), rtol=2**-8, atol=0)
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(read.tensor(kept), task.checkpoint.tensor(kept.replace("layers.0", "layers.1")))
    assert {row["level"] for row in facts} == {"q4_0", "q8_0", "drop"}
    with pytest.raises(UserError, match=r"use drop=\[block\]"):
        mixed_gguf(task.architecture, task.output, assigned, tmp_path / "mix", GgufOptions(), {0: {"mlp"}})
