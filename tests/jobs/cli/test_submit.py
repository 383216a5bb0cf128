"""What `hasten submit` sends, without a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.cluster.submission import job_server as submission
from hasten.cluster.submission.job_server import Job
from hasten.jobs.cli import submitted
from hasten.jobs.cli.main import main


@pytest.fixture
def sent(monkeypatch):
    """What was handed to the cluster: a list, to which each submission adds its arguments."""
    calls = []

    class Server:
        url = "http://head:8265"

        def __init__(self, address):
            self.address = address

        def submit(self, *arguments):
            calls.append((self.address, *arguments))
            return "some-id"

    monkeypatch.setattr(submission, "JobServer", Server)
    return calls


def words_of(sent, *words):
    """Words of the job that `hasten submit --no-wait WORDS` sends to work in /work."""
    assert main(["submit", "--no-wait", "--workdir", "/work", *words]) == 0
    return sent[-1][1]


def test_the_id_is_printed_and_what_runs_here_is_sent_to_the_current_folder(sent, folder, capsys):
    assert main(["submit", "--address", "head", "--no-wait", "--name", "mine", "compress", "bits=3"]) == 0
    assert capsys.readouterr().out == "some-id\n"
    assert sent == [("head", ["compress", "bits=3", "address=auto"], str(folder), "tree", {}, "mine")]


def test_paths_are_made_absolute_unless_they_are_names_or_lie_elsewhere(sent, folder):
    (folder / "here").mkdir()
    given = {
        "model=here": "model=/work/here",
        "model=org/name": "model=org/name",
        "model=embedded:draft": "model=embedded:draft",
        "model=/models/llama": "model=/models/llama",
        "model=s3://bucket/llama": "model=s3://bucket/llama",
        "model=~/llama": "model=~/llama",
        "output=out": "output=/work/out",
        "output=/out": "output=/out",
        "output=null": "output=null",
        "run_dir=a b": "run_dir=/work/a b",
        "calibration.source=here": "calibration.source=/work/here",
        "calibration.source=library": "calibration.source=library",
        "bits=3": "bits=3",
    }
    for word, expected in given.items():
        assert words_of(sent, "compress", word) == ["compress", expected, "address=auto"]
    assert words_of(sent, "decode", "memory=learned")[1] == "memory=/work/learned"


def test_a_plan_is_made_on_the_cluster(sent, folder):
    asked = ["compress", "plan=true", "plan.nodes=8", "bits=3"]
    assert words_of(sent, *asked) == [*asked, "address=auto"]


@pytest.mark.parametrize("word", ["plan.node=8", "plan.memory=much", "bist=3"])
def test_a_plan_with_a_mistake_is_not_sent(sent, folder, capsys, word):
    assert main(["submit", "--no-wait", "compress", "plan=true", word]) == 2
    assert sent == []
    assert word.partition("=")[0] in capsys.readouterr().err


def test_a_sweep_has_no_plan(sent, folder, capsys):
    assert main(["submit", "--no-wait", "compress", "--multirun", "bits=2,3", "plan=true"]) == 2
    assert sent == []
    assert "plan=true plans one run" in capsys.readouterr().err


def test_a_job_joins_the_cluster_that_it_runs_on(sent, folder):
    assert words_of(sent, "compress", "address=other:6379") == ["compress", "address=other:6379"]
    assert words_of(sent, "pretrain") == ["pretrain"], "it has no address"
    assert words_of(sent, "bench", "lossless") == ["bench", "lossless"]
    assert words_of(sent, "compress", "--multirun", "bits=2,3") == [
        "compress",
        "--multirun",
        "bits=2,3",
        "sweep.address=auto",
    ]
    assert words_of(sent, "compress", "-m", "sweep.address=null") == ["compress", "-m", "sweep.address=null"]


def test_each_path_of_a_sweep_is_made_absolute(sent, folder):
    (folder / "here").mkdir()
    assert (
        words_of(sent, "compress", "--multirun", "model=here,org/name,/there")[2] == "model=/work/here,org/name,/there"
    )


def test_quoted_paths_are_made_absolute_and_quoted_again(sent, folder):
    assert words_of(sent, "compress", "output='a b,=[x]'")[1] == "output=/work/a b,=[x]"
    assert words_of(sent, "compress", "output='/there, too'")[1] == "output='/there, too'"
    assert words_of(sent, "compress", "--multirun", "output='a b,=[x]/{point}'")[2] == "output='/work/a b,=[x]/{point}'"
    Path("a, b").mkdir()
    paths = words_of(sent, "compress", "--multirun", "model='a, b',org/name,/there,embedded:target")[2]
    assert paths == "model='/work/a, b',org/name,/there,embedded:target"


WRONG = {
    "compress bts=3": "unknown option 'bts': did you mean bits?",
    "compress bits=9": "bits=9 is wrong: expected a whole number from 2 to 8",
    "compres": "unknown job 'compres': did you mean compress?",
    "bench": "hasten submit bench needs the name of a benchmark: ",
    "compress --no-wait": "--no-wait belongs to submit: it comes before compress",
    "compress --address=head": "--address=head belongs to submit: it comes before compress",
    "--env other compress": "--env other is wrong: expected tree, installed, none or the path of a wheel",
    "--workdir here compress": "--workdir here is wrong: expected an absolute path",
    "--runtime-env missing.yaml compress": "--runtime-env missing.yaml cannot be read: ",
    "--runtime-env list.yaml compress": "--runtime-env list.yaml is wrong: expected keys of Ray's runtime environment",
    "--runtime-env number.yaml compress": "env_vars with texts",
    "--adress head compress": "see hasten submit --help",
    "": "see hasten submit --help",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_line_and_nothing_is_sent(sent, folder, capsys, words):
    (folder / "list.yaml").write_text("[pip]")
    (folder / "number.yaml").write_text("env_vars: {A: 1}")
    assert main(["submit", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hasten: error: ")
    assert err.count("\n") == 1
    assert WRONG[words] in err
    assert sent == []


def test_a_runtime_environment_is_handed_on(sent, folder):
    Path("env.yaml").write_text("env_vars: {A: 'one'}\npip: [packaging]\n")
    words_of(sent, "--runtime-env", "env.yaml", "evaluate")
    assert sent[-1][4] == {"env_vars": {"A": "one"}, "pip": ["packaging"]}


def test_a_submitted_job_changes_to_its_workdir_or_names_a_missing_one(folder, monkeypatch, capsys):
    place = folder / "it's here"
    place.mkdir()
    monkeypatch.setattr(submitted, "hasten", lambda words: print(os.getcwd(), words) or 7)
    assert submitted.main(str(place), ["compress"]) == 7
    assert capsys.readouterr().out == f"{place} ['compress']\n"
    assert submitted.main(str(folder / "no"), ["compress"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hasten: error: --workdir {folder / 'no'} is no folder on the cluster's head (No such file")
    assert err.count("\n") == 1


ENDS = {("SUCCEEDED", 0): 0, ("FAILED", 2): 2, ("FAILED", None): 1, ("FAILED", -9): 137, ("STOPPED", None): 130}


@pytest.mark.parametrize(("status", "code"), ENDS)
def test_exit_codes_are_those_of_a_shell(status, code):
    assert Job("id", "compress", "/work", status, "", None, None, code).code == ENDS[status, code]


@pytest.mark.parametrize("command", ["submit", "status", "logs", "stop"])
def test_help_of_the_commands_imports_nothing_heavy(command):
    script = (
        f"import sys; from hasten.jobs.cli.main import main; code = main(['{command}', '--help']); "
        "print([name for name in ('ray', 'torch', 'omegaconf', 'numpy') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"usage: hasten {command} " in done.stdout
