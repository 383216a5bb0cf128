import json

import pytest

from hasten.accel.data.library import is_held_out
from hasten.accel.errors import UserError
from hasten.jobs.cli.compose import compose
from hasten.jobs.pretrain import run as pretrain
from hasten.jobs.pretrain.model_card import model_card
from hasten.jobs.pretrain.options import PretrainConfig

WORDS = ["alpha", "beta", "gamma", "delta", "return", "yield", "class", "import", "lambda", "assert", "while", "break"]
TINY = [
    *("hidden_size=16", "intermediate_size=32", "heads=2", "kv_heads=1", "head_dim=8", "depths=[[1,256],[2,256]]"),
    *("batch=4", "sequence_length=32", "warmup_steps=2"),
]


@pytest.fixture
def library(tmp_path):
    """Folder of small source files; some are held out, among them one in a folder of tests."""
    root = tmp_path / "library"
    (root / "test").mkdir(parents=True)
    names = [f"{folder}module_{index}.py" for folder in ("", "test/") for index in range(60)]
    for number, name in enumerate(names):
        lines = (f"{WORDS[(number + line) % 12]} {WORDS[(number * line) % 12]}" for line in range(20))
        (root / name).write_text("\n".join(lines))
    assert {name.startswith("test/") for name in names if is_held_out(name)} == {True, False}
    return root


def tiny(tmp_path, *words, models=("draft",)):
    """Config of a training of seconds."""
    config = compose(
        "pretrain",
        PretrainConfig,
        [
            f"models=[{','.join(models)}]",
            f"library={tmp_path / 'library'}",
            f"output={tmp_path / 'models'}",
            f"run_dir={tmp_path / 'run'}",
            f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
            "vocab_size=300",
            "workers=1",
            *(f"{model}.{word}" for model in models for word in TINY),
            *words,
        ],
    )
    return config


@pytest.mark.slow
def test_a_training_writes_checkpoint_card_and_report_and_resumes(tmp_path, library, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The processes that train inherit it: compiling takes longer than everything else here together.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    path = pretrain.run(tiny(tmp_path))
    report = json.loads(path.read_text())
    folder = tmp_path / "models" / "draft"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    metrics = report["metrics"]
    assert metrics["draft.tokens"] == 512
    assert metrics["draft.parameters"] == model.num_parameters()
    # A uniform guess costs log2(300) = 8.2 bits a token, and a token is a byte or more.
    assert 0 < metrics["draft.bits_per_byte"] < 8.3
    assert f"{metrics['draft.bits_per_byte']:.3f} over all files" in (folder / "README.md").read_text()

    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("hasten.jobs.pretrain.run.train_in_processes", pytest.fail)
    pretrain.run(tiny(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"draft\.lr was 0\.006, is 0\.1.*overwrite=true"):
        pretrain.run(tiny(tmp_path, "draft.lr=0.1"))


WRONG = {
    "models=[tarjet]": "models=",
    "models=[]": "models=",
    "models=[draft,draft]": "models=",
    "draft.depths=[]": "draft.depths=",
    "draft.depths=[[1,2,3]]": "draft.depths=",
    "draft.depths=[[1,0]]": "draft.depths=",
    "draft.depths=[[2,9],[1,9]]": "never loses",
    "draft.kv_heads=3": "must divide",
    "draft.head_dim=7": "even",
    "workers=3": "workers=3 must divide",
    "library=/no/such/folder": "library=/no/such/folder",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path, library, word):
    with pytest.raises(UserError, match=WRONG[word]):
        pretrain.run(tiny(tmp_path, word))
    assert [path.name for path in tmp_path.iterdir()] == ["library"]


def test_a_library_too_small_to_hold_out_a_file_is_refused(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "module_0.py").write_text("pass")
    with pytest.raises(UserError, match="to hold out"):
        pretrain.run(tiny(tmp_path))


@pytest.mark.parametrize("word", ["overwrite=false", "overwrite=true"])
def test_an_output_that_holds_something_else_is_refused_and_kept(tmp_path, library, word):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        pretrain.run(tiny(tmp_path, word))
    assert (tmp_path / "models" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "run").exists()


def test_the_cards_command_names_what_differs_from_the_default(tmp_path):
    facts = dict.fromkeys(("parameters", "bytes", "tokens", "held_out_bytes", "train_files", "held_out_files"), 7)
    usual = compose("pretrain", PretrainConfig, ["models=[target]"])
    assert "    hasten pretrain models=[target]\n" in model_card("target", facts, usual)
    changed = compose("pretrain", PretrainConfig, ["seed=3", "target.depths=[[1,9],[2,8]]", "draft.lr=1"])
    card = model_card("target", facts, changed)
    assert "    hasten pretrain models=[target] seed=3 target.depths=[[1,9],[2,8]]\n" in card
    assert "9 with 1 layers, then 8 with 2 layers" in card


RECALL = [
    *("recall.base=embedded:draft", "recall.stages=[[96,64,2]]", "recall.batch=192"),
    *("recall.contexts=[64]", "recall.samples=1"),
]


def recall(tmp_path, *words):
    """Config of a fine-tuning of two steps."""
    config = tiny(tmp_path, *RECALL, *words)
    config.models = ["recall"]
    return config


@pytest.mark.slow
def test_the_recall_variant_is_written_with_what_it_recalls_and_resumes(tmp_path, library, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = json.loads(pretrain.run(recall(tmp_path)).read_text())["metrics"]
    folder = tmp_path / "models" / "recall"
    assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == "torch.bfloat16"
    assert len(AutoTokenizer.from_pretrained(folder)) == 4096
    assert metrics["recall.tokens"] == 384
    card = (folder / "README.md").read_text()
    for task in ("needle", "keys", "joint", "repeated", "multi_turn"):
        assert f"| {task} | {metrics[f'recall.{task}_64']:.0%} |" in card

    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("hasten.accel.training.recall.recall_loss", pytest.fail)
    pretrain.run(recall(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"recall\.lr was 0\.002, is 0\.1.*overwrite=true"):
        pretrain.run(recall(tmp_path, "recall.lr=0.1"))


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("recall.stages=[]", "expected stages"),
        ("recall.stages=[[64,96,2]]", "expected stages"),
        ("recall.stages=[[96,64,0]]", "expected stages"),
        ("recall.stages=[[96,64,2,95]]", "expected stages"),
        ("recall.contexts=[4]", r"recall\.contexts="),
        ("recall.contexts=[2000]", "need 2128 positions"),
    ],
)
def test_a_wrong_setting_of_the_recall_variant_is_refused_before_anything_is_written(tmp_path, library, word, reason):
    with pytest.raises(UserError, match=reason):
        pretrain.run(recall(tmp_path, word))
    assert [path.name for path in tmp_path.iterdir()] == ["library"]
