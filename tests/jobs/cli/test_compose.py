import re

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.cli import methods
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.methods import method_names
from hasten.jobs.cli.options import Option, nearest, options
from hasten.jobs.common.schema import plain
from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.pretrain.options import PretrainConfig


@pytest.mark.parametrize("job", jobs())
def test_a_job_without_words_has_the_defaults_that_its_schema_and_its_file_give(job):
    config = compose(job, jobs()[job].options, [])
    assert type(config) is jobs()[job].options
    assert config.tracking.experiment == "hasten"


def test_words_set_keys_of_every_type():
    config = compose(
        "compress",
        CompressConfig,
        ["bits=3", "symmetric=true", "output=null", "calibration.sequences=4", "quantizer.damping=0.1", "skip_last=1"],
    )
    assert (config.bits, config.symmetric, config.output, config.skip_last) == (3, True, None, 1)
    assert config.calibration.sequences == 4
    assert config.quantizer["damping"] == 0.1


@pytest.mark.parametrize(
    "path",
    ["/a b/c,d", "/x=1/[y]{z}", "C:\\models", "embedded:draft", "~/å", "it's", "'a' b", "'a','b'", '"', "3", "()"],
)
def test_texts_are_kept_verbatim(path):
    assert compose("compress", CompressConfig, [f"model={path}"]).model == path


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("'runs/a b,=[x]'", "runs/a b,=[x]"),
        ('"runs/a b,=[x]"', "runs/a b,=[x]"),
        ("'(a){b}:c'", "(a){b}:c"),
        (r"'it\'s'", "it's"),
        (r'"say \"x\""', 'say "x"'),
        ("\"'quoted'\"", "'quoted'"),
        (r"'a\b'", r"a\b"),
        (r"'a\\'", "a\\"),
        ("'null'", "null"),
        ("'3'", "3"),
        ("''", ""),
        ("'å ü'", "å ü"),
    ],
)
def test_quotes_around_a_value_are_those_of_hydras_grammar(text, content):
    config = compose("compress", CompressConfig, [f"model={text}", f"output={text}"])
    assert (config.model, config.output) == (content, content)


def test_values_of_every_type_may_be_quoted():
    words = ["bits='3'", 'symmetric="true"', "quantizer='gptq'", "quantizer.damping='0.1'", "ignore='layers\\.[01]'"]
    config = compose("compress", CompressConfig, words)
    assert (config.bits, config.symmetric, config.ignore) == (3, True, ["layers\\.[01]"])
    assert config.quantizer["damping"] == 0.1
    with pytest.raises(UserError, match="bits='x' is wrong: expected a whole number from 2 to 8"):
        compose("compress", CompressConfig, ["bits='x'"])


@pytest.mark.parametrize("text", ["/a/${b}", "/a/${", "${a.b.c}"])
def test_an_interpolation_of_no_option_is_one_line(text):
    with pytest.raises(
        UserError, match=rf"model={re.escape(text)} is wrong .*: \$\{{KEY\}} stands for the value"
    ) as caught:
        compose("compress", CompressConfig, [f"model={text}"])
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_one_line():
    with pytest.raises(UserError, match=r"model=\?\?\? is wrong: \?\?\? stands for a missing value"):
        compose("compress", CompressConfig, ["model=???"])


def test_an_interpolation_of_an_option_is_its_value():
    config = compose("compress", CompressConfig, ["bits=3", "output=models/w${bits}"])
    assert config.output == "models/w3"
    assert compose("compress", CompressConfig, [r"output=models/\${bits}"]).output == "models/${bits}"


def test_a_list_is_written_in_brackets_or_as_its_only_item():
    for words, expected in {
        "[.*down_proj, 'layers\\.(0|1)\\.']": [".*down_proj", "layers\\.(0|1)\\."],
        "['a,b', \"c'd\", 'it\\'s', '3', e]": ["a,b", "c'd", "it's", "3", "e"],
        "lm_head": ["lm_head"],
        "layers\\.[01]": ["layers\\.[01]"],
        "[]": [],
    }.items():
        assert compose("compress", CompressConfig, [f"ignore={words}"]).ignore == expected
    stages = compose("pretrain", PretrainConfig, ["draft.depths=[[1, 10], [2, 20]]"]).draft.depths
    assert stages == [[1, 10], [2, 20]]


@pytest.mark.parametrize("name", method_names("quantizer"))
def test_every_quantizer_is_chosen_by_its_name_and_built(name):
    config = compose("compress", CompressConfig, [f"quantizer={name}"])
    built = methods.build(config.quantizer)
    assert f"{type(built).__module__}.{type(built).__name__}" == config.quantizer["_target_"]


@pytest.mark.parametrize("name", method_names("quantizer"))
def test_a_methods_fields_are_those_of_its_class(name):
    config = compose("compress", CompressConfig, [f"quantizer={name}"])
    built = methods.build(config.quantizer)
    assert {item.name: item.default for item in methods.method("quantizer", name).fields} == vars(built)


def test_a_hyper_parameter_that_makes_no_sense_is_a_users_mistake():
    config = compose("compress", CompressConfig, ["quantizer.damping=-1"])
    with pytest.raises(UserError, match="damping"):
        methods.build(config.quantizer)


def test_a_config_as_plain_values_holds_dictionaries_lists_and_numbers_alone():
    values = plain(compose("compress", CompressConfig, ["calibration.seed=7"]))
    assert values["calibration"]["seed"] == 7
    assert values["quantizer"] == {"_target_": "hasten.accel.compression.quantizers.gptq.GPTQ"}


def test_files_are_held_to_the_rules_of_the_command_line(tmp_path, monkeypatch):
    """A conf/compress.yaml with bits: 9 would otherwise be found out hours later."""
    (tmp_path / "conf_of_a_test").mkdir()
    (tmp_path / "conf_of_a_test" / "__init__.py").touch()
    (tmp_path / "conf_of_a_test" / "pretrain.yaml").write_text(
        "defaults: [pretrain_schema, _self_]\ntarget: {batch: 0}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "CONF", tmp_path / "conf_of_a_test")
    monkeypatch.setattr("hasten.jobs.cli.compose.CONF_MODULE", "conf_of_a_test")
    with pytest.raises(UserError, match=r"target\.batch=0 is wrong: expected a whole number, 1 or more"):
        compose("pretrain", PretrainConfig, [])


def test_the_nearest_key_may_differ_in_its_section():
    assert nearest("seqences", ["model", "calibration.sequences", "calibration.seed"]) == "calibration.sequences"
    assert nearest("zzz", ["model", "bits"]) is None


def test_accepted_values_are_described_in_words():
    expected = {item.key: item.expected for item in options(CompressConfig)}
    assert expected["bits"] == "a whole number from 2 to 8"
    assert expected["output"] == "text, or null"
    assert expected["ignore"] == "a list such as [a,b]"
    assert Option("share", float, at_least=0).expected == "a number, 0 or more"
