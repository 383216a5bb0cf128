"""transformers with checkpoints whose output layer or embedding is packed: alone, and with hasten's loader."""

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hasten.accel.compression.calibration.outer import make_outer_levels
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

METHOD = "compressed-tensors"


@pytest.fixture
def alone(monkeypatch):
    """transformers as it is without hasten."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)


@pytest.fixture
def loader(alone, monkeypatch):
    module = importlib.import_module("hasten.accel.models.transformers_loader")
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, module.Loader)


def compressed(folder, head, embedding, family="llama", tied=False, bits=4, symmetric=True, dtype=torch.bfloat16):
    source = tiny.save(folder / "model", family, dtype=dtype, tie_word_embeddings=tied)
    chosen = local.settings(
        source,
        folder / "out",
        RoundToNearest(),
        scheme=Scheme(bits, 32, symmetric),
        outer=make_outer_levels(head, embedding, 32, 32),
    )
    local.compress(chosen, tiny.tokens(1))
    return folder / "out"


def check(folder):
    """The matrices and the logits that transformers computes are those of our unpacked model."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    ours = Architecture(Checkpoint(folder), torch.bfloat16)
    with torch.no_grad():
        found = model(tiny.tokens()).logits.float()
        hidden = ours.embed(tiny.tokens())
        for block in range(ours.num_blocks):
            hidden = ours.run_block(ours.load_block(block), block, hidden)
        torch.testing.assert_close(found, ours.head(hidden), rtol=0, atol=0)
    checkpoint = ours.checkpoint
    assert torch.equal(model.get_output_embeddings().weight, checkpoint.tensor(ours.head_name()))
    assert torch.equal(model.get_input_embeddings().weight, checkpoint.tensor(ours.embedding_name()))


@pytest.mark.parametrize(
    ("head", "embedding", "tied", "symmetric"),
    [([8], [], False, True), ([6], [], False, True), ([4], [4], False, True), ([4], [], True, True)],
    ids=["8-bit head", "6-bit head", "one grid", "one grid, tied"],
)
def test_transformers_alone_loads_an_untied_head_and_pairs_of_the_blocks_own_grid(
    tmp_path, alone, head, embedding, tied, symmetric
):
    check(compressed(tmp_path, head, embedding, tied=tied, symmetric=symmetric))


@pytest.mark.parametrize(
    ("head", "embedding", "family", "tied", "symmetric"),
    [
        ([8], [6], "llama", False, True),
        ([], [8], "llama", True, True),
        ([8], [6], "llama", False, False),
        ([6], [], "opt", True, False),
        ([8], [4], "qwen3_moe", False, True),
    ],
)
def test_the_loader_loads_what_transformers_alone_refuses(
    tmp_path, alone, monkeypatch, head, embedding, family, tied, symmetric
):
    folder = compressed(tmp_path, head, embedding, family, tied, symmetric=symmetric)
    # An error, and not wrong weights.
    with pytest.raises((AttributeError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder)
    module = importlib.import_module("hasten.accel.models.transformers_loader")
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, module.Loader)
    check(folder)


def test_a_tied_pair_in_fewer_bits_is_a_target_of_decoding(tmp_path, loader):
    # Scales of float32, because transformers rounds unpacked weights to the dtype of the scales.
    folder = compressed(tmp_path, [8], [], tied=True, dtype=torch.float32)
    target = load_target(folder, torch.float32)
    target.reserve(1, 32)
    tokens = tiny.tokens()[0].tolist()
    found = target.forward([0], [tokens], [range(-1, len(tokens) - 1)]).logits[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        # float32, in products of other kernels.
        torch.testing.assert_close(found, model(tiny.tokens()[:1]).logits[0], rtol=1e-4, atol=1e-4)


def test_other_checkpoints_are_left_to_transformers(tmp_path, loader):
    folder = compressed(tmp_path, [8], [])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight_packed.dtype == torch.int32
