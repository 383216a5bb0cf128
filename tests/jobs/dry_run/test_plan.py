"""Dry runs: what they print and write, what they refuse, and that what they advise fits; and one against a real run."""

import json
from pathlib import Path

import pytest
import torch

from hasten.accel.costs.estimate import Rates
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.eagle import Eagle
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.main import main
from hasten.jobs.common.sizes import parse_bytes
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.advice import with_options
from hasten.jobs.dry_run.options import PlanConfig, parse_words
from hasten.jobs.dry_run.planned import planned_jobs
from hasten.jobs.dry_run.run import make_plan, plan
from tests.jobs.report import last_report

LLAMA_405B = Path(__file__).parents[2] / "costs" / "llama_405b"
NODE = ["plan.gpus=8", "plan.gpu_memory=80GB", "plan.cpus=96", "plan.memory=1TB", "plan.disk=10TB"]
RATES = Rates(
    flops=6e10,
    exact_flops=6e10,
    elements=1.5e9,
    launch=1.3e-6,
    memory=5e9,
    store=5e9,
    read=5e9,
    disk=3e8,
    network=1.25e9,
    start=5.0,
    finish=4.0,
    session=6.0,
    worker_bytes=530 * 10**6,
    driver_bytes=740 * 10**6,
    device_bytes=600 * 10**6,
)


def planned(job, *words):
    """Config and plan of a job by the words of a command line."""
    plan_config, rest = parse_words(list(words))
    config = compose(job, jobs()[job].options, rest)
    return config, plan_config, make_plan(job, config, plan_config, RATES)


@pytest.fixture
def known_rates(monkeypatch):
    """Rates that take no time to measure."""
    monkeypatch.setattr("hasten.cluster.runtime.rates.measure", lambda *_: RATES)


@pytest.mark.ray
def test_a_plan_of_the_embedded_model_matches_a_real_run(tmp_path, ray_session, monkeypatch):
    # This process has imported whatever other tests needed: of the run, actors and tasks are what can be compared.
    monkeypatch.setattr("hasten.cluster.programs.calibration.peak_rss_bytes", lambda: 0)
    words = [
        "calibration.sequences=16",
        "evaluation.sequences=4",
        f"output={tmp_path / 'out'}",
        f"run_dir={tmp_path / 'run'}",
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    ]
    config = compose("compress", jobs()["compress"].options, words)
    found = make_plan("compress", config, PlanConfig())  # with this machine's own rates
    assert main(["compress", *words]) == 0
    metrics = json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    peaks = {process.kind: process.peak_bytes for process in found.estimate.processes}
    assert peaks["evaluation"] == pytest.approx(metrics["evaluation_peak_rss_bytes"], rel=0.15)
    assert max(peaks["evaluation"], peaks["calibrator"]) == pytest.approx(metrics["peak_rss_bytes"], rel=0.15)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert found.estimate.written_bytes == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("job", planned_jobs())
def test_every_job_but_benchmarks_has_a_plan(job):
    _, _, found = planned(job, "plan.memory=64GB", "plan.disk=1TB")
    assert found.fits
    assert found.estimate.cpu_seconds > 0
    for process in found.estimate.processes:
        assert process.peak_bytes > RATES.worker_bytes


def test_the_command_prints_tables_and_writes_nothing_but_its_report(folder, capsys, known_rates):
    assert main(["plan", "compress", "bits=3", "workers=1", "plan.memory=8GB"]) == 0
    report, run_dir = last_report(capsys)
    assert report["plan_of"] == "compress"
    assert report["config"]["bits"] == 3
    assert report["plan"]["fits"]
    assert report["plan"]["cluster"]["memory"] == "8GB"
    assert report["metrics"]["planned_written_bytes"] == sum(report["plan"]["written_bytes"].values())
    kinds = {process["kind"]: process for process in report["plan"]["processes"]}
    assert kinds["calibrator"]["peak_bytes"] == sum(kinds["calibrator"]["parts"].values())
    assert [file for file in folder.rglob("*") if file.is_file()] == [folder / run_dir / "report.json"]


def test_llama_405b_is_planned_from_its_config_alone():
    _, _, found = planned("compress", f"model={LLAMA_405B}", "workers=8", *NODE)
    assert found.fits
    weights = 126 * 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248)
    # Four bits and, for each 128 weights, a scale of 16 bits and a zero point of 4.
    packed = weights * (4 + 20 / 128) / 8
    assert found.estimate.written["blocks"] == pytest.approx(packed, rel=1e-4)
    assert found.estimate.written["embedding and head"] == pytest.approx(2 * 2 * 128256 * 16384, rel=1e-4)
    assert [each.processes["calibrator"] for each in found.placement.nodes] == [8]


@pytest.mark.parametrize(
    ("job", "words", "knob"),
    [
        # In one dtype: auto is bfloat16 on some processors, and takes less.
        (
            "compress",
            ["calibration.sequences=1024", "workers=1", "plan.memory=1.7GB", "dtype=float32"],
            "calibration.sequences",
        ),
        ("compress", ["workers=4", "plan.nodes=1", "plan.cpus=2"], "workers"),
        ("compress", ["calibration.batch=128", "plan.memory=3GB", "evaluation.sequences=0"], "calibration.batch"),
        ("search", ["workers=8", "plan.memory=6GB"], "workers"),
        ("evaluate", ["batch=64", "plan.memory=2.2GB"], "batch"),
        ("decode", ["in_flight=16", "max_new_tokens=1500", "plan.memory=1.42GB", "dtype=float32"], "in_flight"),
        (
            "compress",
            [
                f"model={LLAMA_405B}",
                "calibration.sequences=2048",
                "calibration.sequence_length=2048",
                "workers=1",
                "propagate=quantized",
                *NODE,
            ],
            "workers",
        ),
        (
            "compress",
            ["calibration.sequences=512", "workers=1", "plan.memory=2GB", "dtype=float32"],
            "propagate",
        ),
    ],
)
def test_every_advice_makes_the_job_fit(job, words, knob):
    config, plan_config, found = planned(job, *words)
    assert not found.fits
    assert knob in {key for row in found.advice for key, _ in row}
    for row in found.advice:
        assert make_plan(job, with_options(config, row), plan_config, RATES).fits, row


def test_a_plan_says_when_no_option_helps(capsys, folder):
    config = compose("compress", jobs()["compress"].options, [])
    plan_config, _ = parse_words(["plan.memory=600MB"])
    plan_with_rates = make_plan("compress", config, plan_config, RATES)
    assert not plan_with_rates.fits
    assert plan_with_rates.advice == []


def test_given_rates_stand_for_measured_ones():
    _, _, found = planned("compress", "plan.flops=1e15", "plan.network=100GB", "plan.disk_speed=2GB", "plan.nodes=2")
    assert (found.rates.flops, found.rates.network, found.rates.disk) == (1e15, 100e9, 2e9)
    assert found.rates.elements == RATES.elements


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("1.5TiB", 3 * 2**39), ("512", 512), ("64k", 64_000)])
def test_sizes_are_read(text, size):
    assert parse_bytes("plan.memory", text) == size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "plan.gpu_memory=80XB"], "plan.gpu_memory=80XB is wrong: expected bytes such as 80GB or 512MiB"),
        (["compress", "plan.nodes=0"], "plan.nodes=0 is wrong: expected a whole number, 1 or more"),
        (["compress", "plan.node=2"], "unknown option 'plan.node': did you mean plan.nodes?"),
        (["compress", "plan.nodes"], "'plan.nodes' is no option: options are written key=value"),
        (["bench"], "bench has no plan: there are plans of compress, levels"),
        (["compres"], "compres has no plan: there are plans of compress, levels"),
        (["compress", "bts=3"], "unknown option 'bts': did you mean bits?"),
        (["compress", "workers=9"], "workers=9 is more than the 8 chunks"),
        (["compress", "group_size=100"], "group_size=100 does not divide the 256 columns"),
        (["compress", "device=cuda", "plan.gpus=0"], "device=cuda, but the cluster has no GPU"),
        (["compress", "model=nowhere"], "model='nowhere' does not exist"),
        (["evaluate", "tasks=[arc_easy]"], "tasks=[arc_easy] have no plan"),
        ([], "the following arguments are required: job"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, message, folder, capsys, known_rates):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not list(folder.iterdir())


def test_a_training_is_planned_with_the_heads_own_size_and_the_records_of_every_token():
    words = ("head=eagle", "draft_vocabulary=512", "data.sequences=10", "held_out.generate=false", "train.steps=3")
    _, _, plain = planned("train", *words)
    head, facts = Eagle(), TargetFacts.of(resolve("embedded:target"))
    network = head.build(facts, DraftVocabulary.most_frequent(torch.arange(facts.vocabulary), 512))
    assert plain.estimate.written["head"] == 2 * sum(parameter.numel() for parameter in network.parameters())
    # 10 sequences to train on and 24 held-out ones of 256 tokens; 3 states of 256 numbers, 16 ids.
    assert plain.estimate.written["records"] == (10 + 24) * 256 * (2 * 3 * 256 + 6 * 16 + 9)
    steps = {step.name: step.seconds for step in plain.estimate.steps}
    _, _, longer = planned("train", *words[:-1], "train.steps=6")
    longer_steps = {step.name: step.seconds for step in longer.estimate.steps}
    assert longer_steps["train the head"] == pytest.approx(2 * steps["train the head"])
    assert longer_steps["record the target"] == steps["record the target"]


def test_ranks_of_a_training_divide_its_work_and_what_zero_divides():
    words = ("head=eagle", "train.steps=4", "train.batch=4")
    _, _, one = planned("train", *words)
    _, _, two = planned("train", *words, "train.ranks=2", "train.zero=2")
    assert [process.kind for process in one.estimate.processes] == ["driver"]
    assert [(process.kind, process.count) for process in two.estimate.processes] == [("rank", 2), ("driver", 1)]
    alone, rank = one.estimate.processes[0].host["train"], two.estimate.processes[0].host["train"]
    # Of 5 copies, moments and gradients are divided, and half a copy of the weights is added.
    name = "weights, gradients, optimizer"
    assert rank[name] == pytest.approx(alone[name] * (2 + 4 / 2) / 5)
    assert rank["activations"] == alone["activations"] // 2
    seconds = [{step.name: step.seconds for step in plan.estimate.steps}["train the head"] for plan in (one, two)]
    assert seconds[1] == pytest.approx(seconds[0] / 2)
    assert two.estimate.moved["between ranks"] > 0
    assert not one.estimate.moved


def test_a_head_that_drafts_in_the_targets_pass_is_trained_through_the_target():
    costs = {}
    for head in ("ppd", "medusa"):
        _, _, found = planned("train", f"head={head}", "train.steps=4")
        costs[head] = found.estimate
    assert "target" in costs["ppd"].processes[0].host["train"]
    assert "target" not in costs["medusa"].processes[0].host["train"]
    # It has 768 parameters, and yet a step is not for nothing.
    step = {step.name: step.seconds for step in costs["ppd"].steps}["train the head"]
    assert step > 0.2 * {step.name: step.seconds for step in costs["medusa"].steps}["train the head"]


def test_a_job_without_plan_is_refused_from_its_config_too():
    with pytest.raises(UserError, match="bench has no plan"):
        plan("bench", jobs()["bench"].options(), PlanConfig())
