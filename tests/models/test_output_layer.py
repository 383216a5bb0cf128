from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.output_layer import TILE_LOGITS_BYTES, TILE_WEIGHT_BYTES, OutputLayer, tile_columns
from tests.models import tiny

CPU = torch.device("cpu")


def states(rows: int = 11, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[7, 40, 96], ids="{} columns".format)
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Entries of a tile; 96 is the whole vocabulary."""
    monkeypatch.setattr("hasten.accel.models.output_layer.tile_columns", lambda *_: request.param)
    return int(request.param)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "opt"])
def test_tiles_are_the_logits_of_the_whole_model(tmp_path: Path, family: str, columns: int) -> None:
    folder = tiny.save(tmp_path, family)
    model = tiny.build(family)
    decoder = model.model.decoder if family == "opt" else model.model
    norm = decoder.final_layer_norm if family == "opt" else decoder.norm
    with torch.no_grad():
        expected = model.lm_head(norm(states())).double()
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap is not None:
            expected = cap * (expected / cap).tanh()
    architecture = Architecture(Checkpoint(folder))
    for layer in (architecture.output_layer(), architecture.streamed_output_layer()):
        tiles = list(layer.tiles(layer.inputs(states())))
        assert [first for first, _ in tiles] == list(range(0, 96, columns))
        found = torch.cat([tile for _, tile in tiles], 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_products_have_the_dtype_of_the_model_and_logits_are_float32(tmp_path: Path, columns: int) -> None:
    folder = tiny.save(tmp_path, "llama")
    layer = Architecture(Checkpoint(folder), torch.bfloat16).output_layer()
    inputs = layer.inputs(states().bfloat16())
    assert inputs.dtype == torch.bfloat16
    found = torch.cat([tile for _, tile in layer.tiles(inputs)], 1)
    expected = inputs.float() @ Checkpoint(folder).tensor("lm_head.weight").bfloat16().float().T
    assert torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, expected, rtol=8e-3, atol=1e-3)  # bfloat16 has 8 digits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_the_gradient_is_that_of_autograd(tmp_path: Path, family: str, columns: int) -> None:
    layer = Architecture(Checkpoint(tiny.save(tmp_path, family))).output_layer()
    weight = layer.weight(0, 96)
    given = states().requires_grad_()
    random = torch.randn(11, 96, generator=torch.Generator().manual_seed(4))
    with torch.enable_grad():
        logits = torch.nn.functional.linear(layer._before_matrix(given), weight)
        if layer._cap is not None:
            logits = layer._cap * (logits / layer._cap).tanh()
        (expected,) = torch.autograd.grad(logits, given, random)
    inner = torch.zeros(11, 64)
    for first, tile in layer.tiles(layer.inputs(states())):
        last = first + tile.shape[1]
        inner += layer.inputs_gradient(random[:, first:last].clone(), tile, layer.weight(first, last))
    torch.testing.assert_close(layer.hidden_gradient(states(), inner), expected, rtol=1e-4, atol=1e-5)


def test_a_streamed_layer_names_a_tensor_that_is_not_finite(tmp_path: Path, columns: int) -> None:
    file = tiny.save(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][90, 3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    layer = Architecture(Checkpoint(tmp_path)).streamed_output_layer()
    with pytest.raises(UserError, match=r"lm_head\.weight .* holds NaN"):
        list(layer.tiles(layer.inputs(states())))


def test_a_streamed_layer_reads_only_the_rows_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny.save(tmp_path, "gemma3_text"))
    layer = Architecture(checkpoint).streamed_output_layer()
    read: list[tuple[str, int, int]] = []
    row_range = checkpoint.row_range
    monkeypatch.setattr(checkpoint, "row_range", lambda *place: read.append(place) or row_range(*place))
    monkeypatch.setattr(checkpoint, "tensor", None)
    weight = layer.weight(30, 41)
    assert read == [("model.embed_tokens.weight", 30, 41)]
    assert torch.equal(weight, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"][30:41])


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (128, 640), (256, 4096), (4096, 16384)])
def test_a_tile_stays_within_its_bytes_and_is_never_empty(tokens: int, width: int) -> None:
    columns = tile_columns(tokens, width, CPU)
    assert columns == 256 or 4 * columns * tokens <= TILE_LOGITS_BYTES["cpu"]
    assert columns == 256 or 4 * columns * width <= TILE_WEIGHT_BYTES["cpu"]
    assert columns >= 256


def test_tiles_cover_the_vocabulary_once(tmp_path: Path) -> None:
    layer = OutputLayer([], lambda *_: torch.empty(0), (70001, 640), torch.float32, None, CPU)
    spans = list(layer.spans(200))
    assert spans[0][0] == 0
    assert spans[-1][1] == 70001
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert len(spans) > 10
