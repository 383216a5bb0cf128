"""The example configs for clusters: well-formed, and what they start is a job that hasten accepts."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from hasten.jobs.cli.commands import submit
from hasten.jobs.cli.compose import compose
from hasten.jobs.descriptors.registry import jobs

EXAMPLES = Path(__file__).parents[2] / "examples"
RAY_JOB = EXAMPLES / "kuberay" / "rayjob.yaml"
SLURM = EXAMPLES / "slurm" / "compress.sbatch"


def kuberay_words():
    return shlex.split(yaml.safe_load(RAY_JOB.read_text())["spec"]["entrypoint"])


def slurm_words():
    """Words of the command that the script ends with, its one variable put in."""
    text = SLURM.read_text()
    command = text[text.index("\nhasten submit ") :].replace("\\\n", " ").replace("$shared", "/shared")
    return shlex.split(command)


def test_the_ray_job_has_what_kuberay_asks_for():
    job = yaml.safe_load(RAY_JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in [group["template"]["spec"] for group in groups]:
        [container] = pod["containers"]
        assert {"name", "image", "resources"} <= set(container)
        assert [each["name"] for each in container["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
    [workers] = cluster["workerGroupSpecs"]
    config = compose("compress", jobs()["compress"].options, kuberay_words()[2:])
    asked = config.workers * config.threads
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert asked <= workers["replicas"] * cpus, "the cluster has room for all workers"


def test_the_examples_run_the_ray_that_is_pinned():
    pinned = (EXAMPLES.parent / "constraints.txt").read_text().split("\nray==")[1].split("\n")[0]
    assert yaml.safe_load(RAY_JOB.read_text())["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert f"FROM rayproject/ray:{pinned}-" in (EXAMPLES / "README.md").read_text()


def test_the_slurm_script_is_bash():
    done = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_both_start_the_same_job():
    hasten, *words = kuberay_words()
    assert hasten == "hasten"
    asked = submit._parser().parse_args(slurm_words()[2:])
    sent = submit._remote_words(jobs()[asked.job], asked.words, lambda text: f"{asked.workdir}/{text}")
    assert sorted(sent) == sorted(words)
    assert compose("compress", jobs()["compress"].options, sent[1:]).bits == 3


@pytest.mark.parametrize("words", [kuberay_words(), slurm_words()], ids=["kuberay", "slurm"])
def test_no_word_is_left_to_the_shell(words):
    assert not [word for word in words if "$" in word and "dashboard" not in word]
