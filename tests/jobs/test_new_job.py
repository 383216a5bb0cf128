"""A new job is new files only: a folder with a descriptor, and conf/JOB.yaml."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "jobs/count/__init__.py": '"""Counting."""\n',
    "jobs/count/options.py": '''"""Options of `hasten count`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import Run, option


@dataclass
class CountConfig(Run):
    """Count up to a number."""

    top: int = option(3, "where counting ends", at_least=1)
''',
    "jobs/count/run.py": '''"""`hasten count`."""

import json
from pathlib import Path

from hasten.jobs.common.run import start
from hasten.jobs.count.options import CountConfig


def run(config: CountConfig) -> Path:
    """Count; returns the path of report.json."""
    path = start(config) / "report.json"
    path.write_text(json.dumps({"job": "count", "metrics": {"counted": config.top}}))
    return path
''',
    "jobs/count/estimate.py": '''"""What `hasten count` will take."""

from hasten.accel.costs.estimate import Estimate, Step


def estimate(config, setting):
    """A second a number."""
    return Estimate((), (Step("count", config.top, config.top),))
''',
    "jobs/count/job.py": '''"""`hasten count`: the descriptor."""

from hasten.jobs.count.options import CountConfig
from hasten.jobs.descriptors.descriptor import Job, Needs
from hasten.jobs.descriptors.metrics import Metric


def needs(config: CountConfig) -> Needs:
    """One processor."""
    return Needs(1.0, 0.0, 1)


JOB = Job(
    name="count",
    position=65,
    options=CountConfig,
    run="hasten.jobs.count.run:run",
    needs="hasten.jobs.count.job:needs",
    estimate="hasten.jobs.count.estimate:estimate",
    in_ray=False,
    metrics=(Metric("counted", "counted", "", "maximize"),),
    objectives=("counted",),
    examples=("hasten count top=5",),
)
''',
    "conf/count.yaml": "defaults:\n  - count_schema\n  - _self_\n",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with one job more."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "pyproject.toml").touch()
    for name in ("hasten", "jobs", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("accel", "kernels", "cluster"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def python(checkout, tmp_path):
    """Output of Python with the words, in the checkout."""

    def call(*words):
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_help_plan_and_submission_list_it(python):
    assert "  count               Count up to a number\n" in python("-m", "hasten", "--help")
    text = python("-m", "hasten", "count", "--help")
    assert "  top=3                             where counting ends\n" in text
    assert text.endswith("examples:\n  hasten count top=5\n")
    for command in ("plan", "submit"):
        assert "count" in python("-m", "hasten", command, "--help")


def test_it_runs_and_reports(python, tmp_path):
    last = python("-m", "hasten", "count", "top=7").splitlines()[-1]
    report = json.loads((tmp_path / last.removeprefix("report: ")).read_text())
    assert report["metrics"] == {"counted": 7}


def test_sweeps_reports_and_plans_read_its_descriptor(python):
    script = """
from pathlib import Path
from hasten.accel.costs.estimate import Rates
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.estimates import estimate
from hasten.jobs.dry_run.setting import Setting
from hasten.jobs.report.metrics import metric
from hasten.jobs.sweep.objectives import objectives
from hasten.jobs.sweep.options import SweepConfig
from hasten.jobs.sweep.points import Points

job = jobs()["count"]
point = Points(job, [], Path("/sweep")).make({"top": "2"})
rates = Rates(**{name: 1.0 for name in Rates.__dataclass_fields__})
print(objectives(job, SweepConfig(), searches=True).directions, metric("counted").better)
print(point.name.partition("-")[0], job.needs_of(point.config).cpus)
print([step.seconds for step in estimate(job, point.config, Setting(rates)).steps if step.name == "count"])
"""
    assert python("-c", script).splitlines() == ["('maximize',) maximize", "top=2 1.0", "[2]"]
