"""Compressed checkpoints of every family, as transformers alone loads them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hasten.accel.compression.calibration import slabs
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.accel.evaluation.divergence import evaluate
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

# Loads a checkpoint without hasten.
LOAD = """
import sys, torch
for name in ("hasten", "ray", "hydra", "mlflow"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        model(tokens, use_cache=False)  # some weights are unpacked at the first use
        torch.save(torch.nn.Module.float(model)(tokens, use_cache=False).logits, folder + ".logits")
"""


def logits(folder, tokens):
    architecture = Architecture(Checkpoint(folder))
    hidden = architecture.embed(tokens)
    for block in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(block), block, hidden)
    return architecture.head(hidden)


@pytest.mark.slow
def test_transformers_alone_loads_every_family_and_gives_the_logits_of_our_dequantized_model(tmp_path):
    tokens = tiny.tokens(batch=16)
    folders = []
    for family in tiny.FAMILIES:
        source = tiny.save(tmp_path / family / "original", family, dtype=torch.bfloat16, tie_word_embeddings=False)
        for symmetric in (True, False):
            output = tmp_path / family / f"symmetric_{symmetric}"
            scheme = Scheme(4, 32, symmetric)
            facts = local.compress(local.settings(source, output, scheme=scheme), tokens)
            experts = [row for row in facts if ".experts." in row["layer"]]
            assert facts
            assert all(row["symmetric"] for row in experts)
            assert {row["symmetric"] for row in facts if row not in experts} == {symmetric}
            folders.append(output)
    torch.save(tokens[:2], tmp_path / "tokens")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tokens"), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        found = torch.load(f"{folder}.logits")
        expected = logits(folder, tokens[:2])
        # The weights are equal; only the order of float32 sums differs.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=str(folder))


def test_experts_that_saw_too_few_tokens_are_rounded_to_nearest_and_say_so(tmp_path):
    source = tiny.save(tmp_path / "original", "mixtral", dtype=torch.bfloat16)
    tokens = tiny.tokens(batch=8)
    facts = local.compress(local.settings(source, tmp_path / "all", expert_tokens=0), tokens)
    seen = sorted({row["tokens"] for row in facts if ".experts." in row["layer"]})
    assert seen[0] < seen[-1] <= tokens.numel()
    limit = seen[-1]
    facts = local.compress(local.settings(source, tmp_path / "few", expert_tokens=limit), tokens)
    for row in facts:
        few = ".experts." in row["layer"] and row["tokens"] < limit
        assert row["method"] == ("RoundToNearest" if few else "GPTQ")
        assert any("calibration tokens" in note for note in row["notes"]) == few
    assert any(row["method"] == "RoundToNearest" for row in facts)


def test_scales_of_packed_weights_that_are_not_finite_are_named(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)
    local.compress(local.settings(source, tmp_path / "out", RoundToNearest()), tiny.tokens(4))
    name = "model.layers.1.mlp.up_proj.weight"
    shard = Task(local.settings(source, tmp_path / "out", RoundToNearest())).output.shard(1)
    tensors = load_file(shard)
    tensors[f"{name}_scale"][0, 0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    damaged = Checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=rf"tensor {name}_scale in .*/out holds NaN values"):
        damaged.check(name)
    damaged.check(name.replace("layers.1", "layers.0"))


@pytest.mark.parametrize("change", [{"ignore": ("experts.1.",)}, {"ignore": ("experts",)}, {"skip_first": 1}], ids=str)
def test_experts_of_which_some_would_stay_plain_are_refused(tmp_path, change):
    source = tiny.save(tmp_path / "original", "mixtral", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"leave \d+ of 24 expert layers plain, first model\.layers\.0\.\S+: trans"):
        Task(local.settings(source, tmp_path / "out", RoundToNearest(), **change))


def test_regexes_and_block_numbers_leave_layers_as_they_are(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16, num_hidden_layers=3)
    chosen = local.settings(
        source, tmp_path / "out", RoundToNearest(), ignore=("down_proj$",), skip_first=1, skip_last=1
    )
    facts = local.compress(chosen, tiny.tokens(4))
    assert {row["layer"].split(".")[2] for row in facts} == {"1"}
    assert not any("down_proj" in row["layer"] for row in facts)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    packed = {f"{row['layer']}.weight" for row in facts}
    for name in before.names:
        assert torch.equal(before.tensor(name), after.tensor(name)) == (name not in packed), name


def test_calibration_makes_the_embedded_model_better_than_rounding(tmp_path):
    source = embedded.path("target")
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration = load_tokens("library", tokenizer, 16, 256)
    held_out = load_tokens("library", tokenizer, 4, 256, "held_out")
    divergence = {}
    for name, changes in {
        "rounded": {"quantizer": RoundToNearest()},
        "gptq": {},
        "gptq, originals propagated": {"propagate": "original"},
        "gptq, 4 bits": {"scheme": Scheme(4, 128)},
    }.items():
        chosen = local.settings(source, tmp_path / name, **({"scheme": Scheme(3, 128)} | changes))
        local.compress(chosen, calibration)
        sums = evaluate(Architecture(Checkpoint(tmp_path / name)), held_out, Architecture(Checkpoint(source)))
        divergence[name] = sums.metrics()["kl_divergence"]
    assert divergence["gptq"] < 0.75 * divergence["rounded"]
    assert divergence["gptq, originals propagated"] < 0.85 * divergence["rounded"]
    assert divergence["gptq, 4 bits"] < 0.5 * divergence["gptq"]


@pytest.mark.parametrize(("name", "gain"), [("nvfp4", 0.95), ("fp8", 1.0)])
def test_the_embedded_model_diverges_less_with_the_scales_that_rounding_searches_by_itself(tmp_path, name, gain):
    source = embedded.path("target")
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, held_out = (load_tokens("library", tokenizer, 4, 256, split) for split in ("train", "held_out"))
    divergence = []
    for quantizer in (RoundToNearest(search=0), RoundToNearest()):
        output = tmp_path / str(quantizer.search)
        local.compress(local.settings(source, output, quantizer, level=parse_level(name)), calibration)
        sums = evaluate(Architecture(Checkpoint(output)), held_out, Architecture(Checkpoint(source)))
        divergence.append(sums.metrics()["kl_divergence"])
    plain, searched = divergence
    assert searched < gain * plain


def test_layers_solved_in_slabs_of_rows_come_out_as_in_one_piece(tmp_path, monkeypatch):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)
    whole = local.compress(local.settings(source, tmp_path / "whole"), tiny.tokens(4))
    monkeypatch.setattr(slabs, "_SLAB", 64 * 24)  # cuts through layers, and packs the end of one with the next
    cut = local.compress(local.settings(source, tmp_path / "slabs"), tiny.tokens(4))
    assert [row["layer"] for row in cut] == [row["layer"] for row in whole]
    for one, other in zip(cut, whole, strict=True):
        assert one["stored_bits"] == other["stored_bits"]
        # Matrix products of other shapes round the last bit another way, which can move single codes.
        assert one["error"] == pytest.approx(other["error"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_transformers_alone_loads_layers_with_groups_of_several_sizes(tmp_path, symmetric):
    tokens, folders = tiny.tokens(batch=4), []
    # With zero points transformers reads one grid for all layers but the experts.
    for family, sizes, changes in (
        ("llama", {64, 128} if symmetric else {64}, {"intermediate_size": 512}),
        ("llama", {64, -1} if symmetric else {-1}, {"intermediate_size": 72}),
        ("qwen3_moe", {32, 64, 128} if symmetric else {32, 64}, {}),
    ):
        name = f"{family}-{len(folders)}"
        source = tiny.save(tmp_path / name, family, dtype=torch.bfloat16, tie_word_embeddings=False, **changes)
        folders.append(tmp_path / f"{name}-compressed")
        facts = local.compress(local.settings(source, folders[-1], scheme=Scheme(4, "auto", symmetric)), tokens)
        assert {row["group_size"] for row in facts} == sizes
    torch.save(tokens[:2], tmp_path / "tokens")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tokens"), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        # The weights are equal; only the order of float32 sums differs.
        torch.testing.assert_close(torch.load(f"{folder}.logits"), logits(folder, tokens[:2]), rtol=1e-3, atol=2e-4)
