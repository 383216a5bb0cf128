"""What every transform in conf/transform must do, through the calibrators that Ray runs as actors."""

from pathlib import Path

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.awq import AWQ
from hasten.accel.compression.transforms.rotating import RotatingTransform
from hasten.accel.data.tokens import load_tokens
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.compression.local import contents
from tests.models import tiny

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "transform").glob("*.yaml"))
# Fast, and at sites of every kind.
CHANGED = {
    "autoround": {"steps": 2, "batch": 2},
    "awq": {"grid": 3},
    "smoothquant": {"all_layers": True},
    "spinquant": {"learning_steps": 1, "batch": 3, "online": True},
}
# All that go together, in an order in which they do.
TOGETHER = ("quarot", "awq", "smoothquant", "gptaq")
TOKENS = tiny.tokens(batch=6, length=16)


def transform_of(path):
    return instantiate(OmegaConf.load(path), **CHANGED.get(path.stem, {}))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def transform(request):
    return transform_of(request.param)


@pytest.fixture(scope="module")
def whole(transform, tmp_path_factory):
    """A checkpoint, and the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    source = tiny.save(folder / "original", "llama")
    local.compress(settings(source, folder / "out", transform), TOKENS)
    return source, folder / "out"


def settings(source, output, *transforms, **changes):
    values = {"quantizer": GPTQ(), "level": parse_level("w4g32"), "expert_tokens": 1}
    return local.settings(source, output, transforms=transforms, **(values | changes))


def logits(architecture, tokens=TOKENS[:2]):
    hidden = architecture.embed(tokens)
    for block in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(block), block, hidden)
    return architecture.head(hidden)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_block_computes_the_same_function_where_nothing_is_quantized(transform, family, tmp_path):
    if not transform.makes_edits:
        pytest.skip("makes no edits")
    source = tiny.save(tmp_path / "original", family)
    chosen = settings(source, tmp_path / "out", transform, quantizer=RoundToNearest())
    local.compress(chosen, TOKENS)
    task = Task(chosen)
    assert all(task.transforms.folder.read(block) for block in range(task.architecture.num_blocks))
    found, expected = logits(task.architecture), logits(Architecture(task.original))
    # Scaled and unscaled products round differently in float32.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("propagate", ["sequential", "quantized", "original"])
def test_any_number_of_workers_gives_the_same_bytes(transform, propagate, tmp_path):
    if transform.needs_original and propagate != "sequential":
        pytest.skip("needs outputs of compressed layers")
    source = tiny.save(tmp_path / "original", "llama")
    for workers in (1, 3):
        chosen = settings(source, tmp_path / str(workers), transform, propagate=propagate)
        local.compress(chosen, TOKENS, workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


class Killed(Exception):  # noqa: N818 (not an error)
    """Stands for a process that ends."""


@pytest.mark.parametrize("stop", ["before the edits", "after the edits", "before the block"])
def test_a_run_that_is_killed_at_a_transform_resumes_with_the_same_bytes(transform, whole, stop, tmp_path, monkeypatch):
    source, unstopped = whole
    killed = settings(source, tmp_path / "killed", transform)

    def end(*arguments, **named):
        raise Killed

    name, at = {
        "before the edits": ("accel.compression.transforms.edits.EditFolder", "write"),
        "after the edits": ("cluster.actors.calibrator.Calibrator", "solve"),
        "before the block": ("accel.compression.outputs.checkpoint.OutputFolder", "write_block"),
    }[stop]
    with monkeypatch.context() as patched:
        patched.setattr(f"hasten.{name}.{at}", end)
        if transform.makes_edits or stop != "before the edits":
            with pytest.raises(Killed):
                local.compress(killed, TOKENS)
    local.compress(killed, TOKENS)
    assert contents(unstopped) == contents(tmp_path / "killed")


def test_transformers_loads_what_is_written(tmp_path):
    source = tiny.save(tmp_path / "original", "qwen2", dtype=torch.bfloat16, tie_word_embeddings=False)
    together = [next(path for path in CONFIGS if path.stem == name) for name in TOGETHER]
    chosen = settings(source, tmp_path / "out", *map(transform_of, together), ignore=(r"layers\.1.*k_proj",))
    local.compress(chosen, TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        model(TOKENS[:2], use_cache=False)
        found = torch.nn.Module.float(model)(TOKENS[:2], use_cache=False).logits
    torch.testing.assert_close(found, logits(Architecture(Checkpoint(tmp_path / "out"))), rtol=1e-3, atol=2e-4)


def test_a_database_holds_transformed_levels_and_kept_layers_are_written_transformed(transform, tmp_path):
    if transform.solves_blocks:
        pytest.skip("makes checkpoints of one level")
    source = tiny.save(tmp_path / "original", "llama")
    levels = (parse_level("w4g32"), parse_level("w8g32"))
    chosen = settings(source, tmp_path / "levels", transform, levels=levels, level=levels[0])
    local.compress(chosen, TOKENS)
    architecture = Architecture(LevelDatabase.checkpoint_of(tmp_path / "levels", source))
    database = LevelDatabase.read(tmp_path / "levels", architecture)
    expected = logits(Architecture(Checkpoint(source)))
    layers = [layer.name for block in range(2) for layer in architecture.linears(block)]
    written = []
    for number, assigned in enumerate([{}, dict.fromkeys(layers[::2], "w8g32")]):
        output = mixed_output(architecture, database, assigned, tmp_path / f"mixed{number}")
        output.open({"mixture": number}, overwrite=False)
        write_mixed(output, database, assigned)
        written.append(logits(Architecture(Checkpoint(output.path))))
    torch.testing.assert_close(written[0], expected, rtol=1e-3, atol=5e-5)
    # Half of the layers at 8 bits: far from what scales on one side only would give.
    assert float((written[1] - expected).square().mean()) < 1e-2 * float(expected.square().mean())
    kept, plain = Checkpoint(tmp_path / "mixed0"), Checkpoint(source)
    same = [torch.equal(kept.tensor(name), plain.tensor(name)) for name in plain.names]
    assert all(same) != (transform.makes_edits or isinstance(transform, RotatingTransform))


def test_awq_loses_less_of_a_trained_model_than_rounding_alone(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    source = embedded.path("target")
    tokens = load_tokens("library", tokenizer, 8, 256)
    held_out = load_tokens("library", tokenizer, 8, 256, split="held_out")
    expected = logits(Architecture(Checkpoint(source)), held_out).log_softmax(-1)
    lost = []
    for name, used in {"plain": (), "awq": (AWQ(grid=10),)}.items():
        chosen = settings(source, tmp_path / name, *used, quantizer=RoundToNearest(), level=parse_level("w3g128a"))
        local.compress(chosen, tokens)
        found = logits(Architecture(Checkpoint(tmp_path / name)), held_out).log_softmax(-1)
        lost.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    assert lost[1] < 0.98 * lost[0]
