"""A quantization config with more than ten groups, whose names do not sort by their numbers."""

from pathlib import Path

from safetensors.torch import load_file

from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny


def test_each_of_many_config_groups_is_that_of_its_layers(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    names = [name for name in load_file(source / "model.safetensors") if "proj" in name]
    assert len(names) > 10
    expected = {name: ((2, 3, 4, 8)[place % 4], (16, 32, 64)[place % 3]) for place, name in enumerate(names)}
    schemes = [
        {
            "targets": [f"re:{name.removesuffix('.weight')}$"],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": group_size,
            },
        }
        for name, (bits, group_size) in expected.items()
    ]
    checkpoint = Checkpoint(tiny.save_packed(tmp_path / "packed", source, schemes, ignore=["lm_head"]))
    found = {name: checkpoint.quantization(name) for name in names}
    assert {name: (scheme.num_bits, scheme.group_size) for name, scheme in found.items()} == expected
    plain = Checkpoint(source)
    for name, (bits, _) in expected.items():
        original = plain.tensor(name)
        error = (checkpoint.tensor(name) - original).abs().max() / original.abs().max()
        # Half a step of the grid, and at its ends a whole one.
        assert error <= 1 / (2 ** (bits - 1) - 0.5)
