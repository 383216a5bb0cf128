"""What each descriptor must have, so that help, sweeps, plans, reports and submission need know no job by name."""

import dataclasses
import shlex
from pathlib import Path

import pytest

import hasten.jobs
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.help import job_help, overview
from hasten.jobs.cli.methods import CONF
from hasten.jobs.cli.options import MULTIRUN, options, split_plan
from hasten.jobs.common.schema import Run, plain
from hasten.jobs.descriptors import registry
from hasten.jobs.descriptors.descriptor import Job, load
from hasten.jobs.descriptors.metrics import PEAK_RSS_BYTES, SECONDS
from hasten.jobs.descriptors.registry import job_of, jobs
from hasten.jobs.sweep.run import check

JOBS = list(jobs().values())
VARIANTS = [job.variants.find(name) for job in JOBS if job.variants for name in job.variants.names()]


@pytest.fixture(params=JOBS, ids=lambda job: job.name)
def job(request):
    return request.param


@pytest.fixture(params=[*JOBS, *VARIANTS], ids=lambda job: "-".join(job.words))
def any_job(request):
    """A job, or one of its variants."""
    return request.param


def test_its_folder_and_its_config_have_its_name(job):
    folder = Path(hasten.jobs.__path__[0], job.name)
    assert (folder / "job.py").is_file()
    assert (folder / "options.py").is_file()
    assert (CONF / f"{job.name}.yaml").is_file()
    assert job.options.__module__ == f"hasten.jobs.{job.name}.options"


def test_its_place_in_the_help_is_its_own(job):
    assert [other.name for other in JOBS if other.position == job.position] == [job.name]
    assert f"  {job.name}" in overview()


def test_its_options_are_a_dataclass_with_a_sentence_and_help_for_each(any_job):
    assert issubclass(any_job.options, Run)
    assert dataclasses.is_dataclass(any_job.options)
    assert any_job.summary.endswith(".")
    text = job_help(any_job)
    assert text.startswith(f"usage: hasten {' '.join(any_job.words)}")
    for item in options(any_job.options):
        assert item.help, item.key
        assert f"  {item.key}=" in text


def test_its_examples_are_commands_that_compose(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job.examples
    for example in job.examples:
        hasten_, name, *words = shlex.split(example)
        assert (hasten_, name) == ("hasten", job.name)
        chosen = job
        if job.variants:
            chosen, words = job.variants.find(words[0]), words[1:]
        _, words = split_plan(words)
        if set(words) & set(MULTIRUN):
            check(chosen, [word for word in words if word not in MULTIRUN])
        else:
            assert type(compose(chosen.name, chosen.options, words)) is chosen.options


def test_the_functions_that_a_descriptor_names_exist(any_job):
    paths = [any_job.needs, *([any_job.run] if any_job.run else []), *([any_job.estimate] if any_job.estimate else [])]
    for path in [*paths, *([any_job.shapes] if any_job.estimate else [])]:
        assert callable(load(path)), path
    assert any_job.run or any_job.variants


def test_a_run_needs_resources_of_a_cluster(any_job):
    needs = any_job.needs_of(compose(any_job.name, any_job.options, []))
    assert needs.threads >= 1
    assert needs.cpus + sum(actor["CPU"] for actor in needs.actors) > 0
    assert needs.gpus >= 0


def test_it_has_an_estimate_or_a_reason_for_none(job):
    assert (job.estimate is None) == bool(job.not_planned)
    with pytest.raises(ValueError, match="needs an estimate, or a reason"):
        Job(name="neither", position=0, options=Run)


def test_its_metrics_have_directions_and_its_objectives_are_among_them(job):
    known = {metric.name: metric for metric in (*job.metrics, PEAK_RSS_BYTES, SECONDS)}
    for metric in job.metrics:
        assert metric.better in ("minimize", "maximize", None)
        assert metric.title
        assert metric.scale > 0
    for name in job.objectives:
        assert known[name].better in ("minimize", "maximize")


def test_a_metric_means_the_same_in_every_job():
    listed = [metric for job in JOBS for metric in job.metrics]
    assert all(registry.metrics()[metric.name] == metric for metric in listed)


def test_a_job_is_found_by_its_words(any_job):
    assert job_of(*any_job.words) == any_job


def test_the_default_config_is_plain_values(any_job):
    assert list(plain(compose(any_job.name, any_job.options, [])))[:2] == ["run_dir", "cache_folder"]
