import errno
import os

import pytest
import torch

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs import resumable as folder_module
from tests.compression import local
from tests.models import tiny


@pytest.fixture
def source(tmp_path):
    return tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)


@pytest.fixture
def task(source, tmp_path):
    return Task(local.settings(source, tmp_path / "out"))


def test_a_folder_with_other_files_is_refused_and_left_alone(task):
    task.output.path.mkdir()
    (task.output.path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            task.output.open({}, overwrite)
    assert (task.output.path / "thesis.tex").read_text() == "years of work"


def test_other_settings_are_refused_by_name_unless_overwritten(source, tmp_path):
    tokens = tiny.tokens(4)
    chosen = local.settings(source, tmp_path / "out")
    local.compress(chosen, tokens)
    for changes, word in (({"expert_tokens": 3}, "expert_tokens: 8, now 3"), ({"ignore": ("up",)}, "ignore")):
        other = Task(local.settings(source, tmp_path / "out", **changes))
        fingerprint = other.settings.fingerprint(other.checkpoint, tokens)
        with pytest.raises(UserError, match=word):
            other.output.open(fingerprint, overwrite=False)
    with pytest.raises(UserError, match="calibration tokens"):
        other.output.open(chosen.fingerprint(other.checkpoint, tokens + 1), overwrite=False)
    other.output.open(fingerprint, overwrite=True)
    assert not other.output.is_finished(0)


def test_a_run_that_ran_out_of_memory_resumes_with_a_smaller_batch(source, tmp_path):
    tokens = tiny.tokens(4)
    chosen = local.settings(source, tmp_path / "out")
    local.compress(chosen, tokens)
    other = Task(local.settings(source, tmp_path / "out", batch=1, threads=2))
    fingerprint = other.settings.fingerprint(other.checkpoint, tokens)
    other.output.open(fingerprint, overwrite=False)
    assert other.output.is_finished(0)
    assert other.output.changed(fingerprint) == ["threads: 1, now 2", "batch: 2, now 1"]
    other.output.open(fingerprint, overwrite=True)
    assert other.output.changed(fingerprint) == []


def test_another_checkpoint_of_the_same_shapes_is_refused(source, tmp_path):
    tokens = tiny.tokens(4)
    local.compress(local.settings(source, tmp_path / "out"), tokens)
    changed = bytearray((source / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (source / "model.safetensors").write_bytes(changed)
    again = Task(local.settings(source, tmp_path / "out"))
    with pytest.raises(UserError, match="checkpoint: "):
        again.output.open(again.settings.fingerprint(again.checkpoint, tokens), overwrite=False)


def test_a_run_resumes_after_space_is_made_on_a_full_disk(source, tmp_path, monkeypatch):
    tokens = tiny.tokens(4)
    whole = local.settings(source, tmp_path / "whole")
    local.compress(whole, tokens)
    chosen = local.settings(source, tmp_path / "out")

    def full(temporary, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    replace = folder_module._replace
    written = []

    def fill_at_the_second_shard(temporary, path):
        written.append(path.name)
        (full if sum(name.endswith(".safetensors") for name in written) == 2 else replace)(temporary, path)

    monkeypatch.setattr(folder_module, "_replace", fill_at_the_second_shard)
    with pytest.raises(UserError, match=r"disk is full while writing model-00003-of-00003\.safetensors"):
        local.compress(chosen, tokens)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(folder_module, "_replace", replace)
    assert Task(chosen).output.is_finished(0)
    local.compress(chosen, tokens)
    assert local.contents(tmp_path / "out") == local.contents(tmp_path / "whole")


def test_nothing_left_to_quantize_and_patterns_that_match_nothing_are_refused(source, tmp_path):
    with pytest.raises(UserError, match="matches no layer"):
        Task(local.settings(source, tmp_path / "out", ignore=("no_such_layer",)))
    with pytest.raises(UserError, match="no layer is left"):
        Task(local.settings(source, tmp_path / "out", skip_first=2))
    with pytest.raises(UserError, match="no regular expression"):
        Task(local.settings(source, tmp_path / "out", ignore=("(",)))
    assert not (tmp_path / "out").exists()


def test_a_compressed_checkpoint_is_not_compressed_again(source, tmp_path):
    local.compress(local.settings(source, tmp_path / "out"), tiny.tokens(4))
    with pytest.raises(UserError, match=f"compressed already: give the original checkpoint, {source}"):
        Task(local.settings(tmp_path / "out", tmp_path / "again"))


def test_a_run_killed_while_it_makes_the_folder_begins_anew(task):
    task.output.open({"bits": 4}, overwrite=False)
    # The file that is written last.
    (task.output.path / ".hasten/fingerprint.json").rename(task.output.path / ".hasten/fingerprint.tmp")
    task.output.open({"bits": 3}, overwrite=False)
    with pytest.raises(UserError, match="bits: 3, now 4"):
        task.output.check({"bits": 4}, overwrite=False)
    assert not list(task.output.path.rglob("*.tmp"))


def test_a_run_killed_while_it_empties_the_folder_leaves_one_that_can_be_overwritten(source, tmp_path, monkeypatch):
    tokens = tiny.tokens(4)
    chosen = local.settings(source, tmp_path / "out")
    local.compress(chosen, tokens)
    whole = local.contents(tmp_path / "out")
    output = Task(chosen).output
    unlink = folder_module.Path.unlink
    for allowed in range(1, 2 * len(whole)):
        left = iter(range(allowed))

        def stop_after_some(path, missing_ok=False, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        monkeypatch.setattr(folder_module.Path, "unlink", stop_after_some)
        try:
            output.open({"bits": 3}, overwrite=True)
        except KeyboardInterrupt:
            assert not output.is_complete
        else:
            break
        finally:
            monkeypatch.setattr(folder_module.Path, "unlink", unlink)
    assert 0 < allowed < 2 * len(whole) - 1
    assert output.finished == []
    assert sorted(local.contents(tmp_path / "out")) == [
        ".hasten/fingerprint.json",
        ".hasten/lock",
        ".hasten/source.json",
    ]


def test_checking_a_folder_makes_nothing(task):
    task.output.check({}, overwrite=True)
    assert not task.output.path.exists()


def same_logits(folder):
    """Compare the model that transformers loads, without missing or unexpected tensors, with the blocks one by one."""
    from transformers import AutoModelForCausalLM

    tokens = tiny.tokens()
    model, found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(found.values()), found
    architecture = Architecture(Checkpoint(folder))
    hidden = architecture.embed(tokens)
    for block in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(block), block, hidden)
    with torch.no_grad():
        model(tokens, use_cache=False)  # some weights are unpacked at the first use
        logits = torch.nn.Module.float(model)(tokens, use_cache=False).logits
    # The weights are equal; only the order of float32 sums differs.
    torch.testing.assert_close(logits, architecture.head(hidden), rtol=1e-3, atol=2e-4)


SYMMETRIC = Scheme(3, 32, symmetric=True)


def test_linear_layers_outside_the_blocks_stay_as_they_are(tmp_path):
    # OPT-350m projects its embeddings.
    source = tiny.save(
        tmp_path / "original", "opt", dtype=torch.bfloat16, word_embed_proj_dim=32, do_layer_norm_before=False
    )
    local.compress(local.settings(source, tmp_path / "out", RoundToNearest(), scheme=SYMMETRIC), tiny.tokens(4))
    same_logits(tmp_path / "out")


def test_a_multimodal_gemma_keeps_its_vision_tower_and_ignored_layers(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    text = tiny.build("gemma3_text").config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=tiny.VOCABULARY - 1)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "original")
    chosen = local.settings(
        tmp_path / "original", tmp_path / "out", RoundToNearest(), scheme=SYMMETRIC, ignore=("down_proj$",)
    )
    local.compress(chosen, tiny.tokens(4))
    same_logits(tmp_path / "out")


def test_layers_are_ignored_where_the_checkpoint_lacks_the_model_prefix(tmp_path):
    tiny.build("llama", tie_word_embeddings=True).model.bfloat16().save_pretrained(tmp_path / "original")
    chosen = local.settings(
        tmp_path / "original", tmp_path / "out", RoundToNearest(), scheme=SYMMETRIC, ignore=("down_proj$",)
    )
    local.compress(chosen, tiny.tokens(4))
    same_logits(tmp_path / "out")


def test_blocks_have_their_original_number_in_calls_and_a_new_one_in_files(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16, num_hidden_layers=4)
    architecture = Architecture(Checkpoint(source))
    output = OutputFolder(tmp_path / "out", architecture, [[]] * 4, CompressedTensors(), kept=[1, 3])
    output.open({}, overwrite=False)
    output.write_block(3, {}, [{"layer": "one"}])
    assert output.finished == [3]
    assert output.facts(3) == [{"layer": "one"}]
    assert output.shard(3).name == "model-00003-of-00003.safetensors"
    output.write_block(1, {}, [])
    output.finish()
    left = Checkpoint(tmp_path / "out")
    assert left.config["num_hidden_layers"] == 2
    for place, block in enumerate((1, 3)):
        for name in architecture.block_tensors(block):
            moved = name.replace(f"layers.{block}.", f"layers.{place}.")
            assert torch.equal(left.tensor(moved), architecture.checkpoint.tensor(name))


TERMS = (
    "LICENSE",
    "LICENSE.md",
    "license-apache",
    "LICENCE",
    "Llama-LICENSE.pdf",
    "NOTICE",
    "THIRD_PARTY_NOTICES.md",
    "COPYING",
    "USE_POLICY.md",
)


def test_terms_of_use_go_with_the_checkpoint(source, tmp_path):
    for name in TERMS:
        (source / name).write_text(f"terms of {name}")
    (source / "README.md").write_text("a model card of the original's weights")
    (source / "NOTICES").mkdir()
    chosen = local.settings(source, tmp_path / "out", RoundToNearest())
    local.compress(chosen, tiny.tokens())
    for name in TERMS:
        assert (chosen.output / name).read_text() == f"terms of {name}"
    assert not (chosen.output / "README.md").exists()
