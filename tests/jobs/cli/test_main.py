import errno
import json
import os
import subprocess
import sys

import pytest

from hasten.jobs.cli.main import main
from hasten.jobs.cli.methods import method_names
from hasten.jobs.cli.options import options
from hasten.jobs.descriptors.registry import jobs

HEAVY = ("torch", "transformers", "ray", "hydra", "omegaconf", "mlflow", "deepspeed", "numpy", "matplotlib")


def run(capsys, *words):
    """Exit code, standard output and standard error of `hasten WORDS`."""
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


WITHOUT_WORK = ["--help", "--version", *(f"{job} --help" for job in jobs())]
WITHOUT_WORK += [f"bench {name} --help" for name in jobs()["bench"].variants.names()]


# Runs all of them in one process; prints for each its exit code and the heavy modules that it imported first.
IMPORTS = """
import json, sys
from hasten.jobs.cli.main import main
heavy, commands = json.loads(sys.argv[1])
results, seen = {}, set()
for words in commands:
    code = main(words.split())
    results[words] = [code, [name for name in heavy if name in sys.modules and name not in seen]]
    seen |= set(sys.modules)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def imports():
    given = json.dumps([HEAVY, WITHOUT_WORK])
    done = subprocess.run([sys.executable, "-c", IMPORTS, given], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", WITHOUT_WORK)
def test_help_and_version_import_nothing_heavy(words, imports):
    assert imports[words] == [0, []]


def test_help_lists_every_job_and_every_quantizer(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in [*jobs(), *method_names("quantizer")]:
        assert name in out


@pytest.mark.parametrize("job", jobs())
def test_help_of_a_job_lists_each_option_with_its_explanation(capsys, job):
    code, out, _ = run(capsys, job, "--help")
    assert code == 0
    for item in options(jobs()[job].options):
        assert f"  {item.key}=" in out
        assert item.help, item.key


def test_help_shows_the_defaults_that_the_config_files_choose(capsys):
    assert "quantizer=gptq" in run(capsys, "compress", "--help")[1]
    assert "target.hidden_size=256" in run(capsys, "pretrain", "--help")[1]
    assert "draft.hidden_size=128" in run(capsys, "pretrain", "--help")[1]


def test_no_word_at_all_shows_the_help(capsys):
    assert run(capsys) == run(capsys, "--help")


def test_version_is_the_distributions(capsys):
    assert run(capsys, "--version")[1] == "hasten 0.2.0\n"


WRONG = {
    "compres": "unknown job 'compres': did you mean compress?",
    "xyzzy": "unknown job 'xyzzy': there are compress, kv_heads, levels, search, evaluate, decode, calibrate_cache, ",
    "compress bts=3": "unknown option 'bts': did you mean bits?",
    "compress sequence_lenght=3": "did you mean evaluation.sequence_length?",
    "compress quantizer.dampng=1": "unknown option 'quantizer.dampng': did you mean quantizer.damping?",
    "compress quantizer=round_to_nearest quantizer.damping=1": "unknown option 'quantizer.damping'",
    "compress hydra.verbose=true": "unknown option 'hydra.verbose'",
    "compress +bits=3": "unknown option '+bits': did you mean bits?",
    "compress --bits 3": "'--bits' is no option: options are written key=value, did you mean bits=VALUE?",
    "compress --multirun bts=2,3": "unknown option 'bts': did you mean bits?",
    "compress --multirun bits=3,9": "bits=9 is wrong: expected a whole number from 2 to 8",
    "compress --multirun bits=2,3 plan=true": "plan=true plans one run",
    "compress bits=2,3": "bits=2,3 is wrong: expected a whole number from 2 to 8; several values are a sweep, with",
    "compress quantizer=gtpq": "quantizer=gtpq is wrong: expected one of gptq, round_to_nearest (did you mean gptq?)",
    "compress bits=four": "bits=four is wrong: expected a whole number from 2 to 8",
    "compress bits=2.5": "bits=2.5 is wrong: expected a whole number from 2 to 8",
    "compress bits=9": "bits=9 is wrong: expected a whole number from 2 to 8",
    "compress workers=0": "workers=0 is wrong: expected a whole number, 1 or more",
    "compress symmetric=maybe": "symmetric=maybe is wrong: expected true or false",
    "compress propagate=both": "propagate=both is wrong: expected one of sequential, quantized, original",
    "compress quantizer.damping=much": "quantizer.damping=much is wrong: expected a number, or null",
    "pretrain draft.depths=[1]": "draft.depths=[1] is wrong: expected a list",
    "pretrain draft.lr=nan": "draft.lr=nan is wrong: expected a number",
    "bench": "hasten bench needs the name of a benchmark",
    "bench xyzzy": "unknown benchmark 'xyzzy'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_one_line_that_names_it_and_leaves_nothing_behind(capsys, folder, words):
    code, out, err = run(capsys, *words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("hasten: error: ")
    assert err.count("\n") == 1
    assert WRONG[words] in err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/report.json"),
            "the disk is full while writing runs/report",
        ),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "the disk is full: make space"),
    ],
    ids=["report", "database"],
)
def test_a_disk_that_is_full_anywhere_is_one_line(capsys, monkeypatch, error, words):
    def fail(config):
        raise error

    monkeypatch.setattr("hasten.jobs.pretrain.run.run", fail)
    code, _, err = run(capsys, "pretrain")
    assert code == 2
    assert words in err.splitlines()[-1]


def test_other_errors_are_raised_unchanged(monkeypatch):
    def fail(config):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hasten.jobs.pretrain.run.run", fail)
    with pytest.raises(OSError, match="Input/output"):
        main(["pretrain"])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_a_path_that_the_system_refuses_is_one_line(capsys, monkeypatch, code):
    def refuse(words):
        raise OSError(code, os.strerror(code), "/some/file")

    monkeypatch.setattr("hasten.jobs.cli.main._main", refuse)
    reason = f"/some/file cannot be used ({os.strerror(code)}): check its permissions, or name another path"
    assert run(capsys, "compress") == (2, "", f"hasten: error: {reason}\n")


def test_a_home_folder_of_nobody_is_one_line(capsys):
    code, _, err = run(capsys, "compress", "model=~no-such-user/model")
    assert code == 2
    assert err == "hasten: error: a path that begins with ~ names no user with a home folder: write the whole path\n"
