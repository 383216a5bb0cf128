"""The job on the embedded target, in this process, on the session's Ray."""

import json

import numpy as np
import pytest
import torch

from hasten.accel.cache.calibrated import settings
from hasten.accel.cache.mixed import read
from hasten.accel.cache.quantize.kvquant import KVQuant
from hasten.accel.cache.statistics import FOLDER, file_name, write_layers
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.main import main
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.options import PlanConfig
from hasten.jobs.dry_run.run import make_plan
from hasten.jobs.search_cache.allocation import CacheSearch
from tests.jobs.report import last_report
from tests.models import tiny

OPTIONS = {
    "levels": "[full,kivi:bits=4,'kivi:bits=2,residual=0']",
    "budget": 0.3,
    "allocator.generations": 1,
    "allocator.offspring": 4,
    "context": 96,
    "new_tokens": 16,
    "sequences": 2,
    "evaluation_sequences": 2,
    "workers": 1,
    "output": "rows",
}


def words(**changes):
    return [f"{key}={value}" for key, value in (OPTIONS | changes).items()]


@pytest.mark.ray
def test_the_search_beats_uniform_levels_resumes_and_is_planned(folder, capsys, ray_session):
    config = compose("search_cache", jobs()["search_cache"].options, words())
    planned = make_plan("search_cache", config, PlanConfig()).estimate
    assert main(["search_cache", *words()]) == 0
    report, run_dir = last_report(capsys)
    (answer,) = report["budgets"]
    full = next(row for row in report["rows"] if row["method"] == "full")
    assert answer["cache_bytes_per_token"] <= 0.3 * full["cache_bytes_per_token"]
    assert answer["kl_divergence"] < answer["interpolated_kl_divergence"]
    assert answer["kl_divergence"] < answer["uniform_kl_divergence"]
    assert len(set(answer["layers"])) > 1
    assert len(read(run_dir / "assignment.json")) == len(answer["layers"]) == 4
    assert (run_dir / "pareto.png").stat().st_size > 0
    assert {row["allocator"] for row in report["rows"]} == {"uniform", "exact", "evopress"}
    # Tolerances of the other jobs' plans.
    (task,) = (process for process in planned.processes if process.kind == "cache task")
    assert task.peak_bytes == pytest.approx(report["metrics"]["peak_rss_bytes"], rel=0.15)

    files = {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("*.json")}
    written = sum(path.stat().st_size for path in files if path.parent.name in ("levels", "mixtures"))
    # The plan cannot know that allocators agree, whose mixture is then measured once.
    mixtures = [path.stat().st_size for path in files if path.parent.name == "mixtures"]
    written += (len(report["rows"]) - len(mixtures)) * mixtures[0]
    assert planned.written_bytes == pytest.approx(written, rel=0.15)
    # A row that is there is not measured again.
    changed = next(path for path in files if path.parent.name == "mixtures")
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {"perplexity": 12345.0}))
    assert main(["search_cache", *words()]) == 0
    again, _ = last_report(capsys)
    assert 12345.0 in {row["perplexity"] for row in again["rows"]}
    assert again["metrics"]["peak_rss_bytes"] is None
    for path, time in files.items():
        assert path == changed or path.stat().st_mtime_ns == time


def test_levels_take_the_statistics_beside_the_checkpoint(folder, tmp_path):
    method = KVQuant(bits=2)
    checkpoint = Checkpoint(tiny.save(tmp_path / "m", "llama"))
    note = {"method": "KVQuant", "settings": dict(settings(method)), "model": checkpoint.fingerprint()}
    changes = {
        "model": checkpoint.path,
        "levels": "[full,'kvquant:bits=2',kivi]",
        "context": 32,
        "source": "tokens.npy",
    }
    np.save("tokens.npy", tiny.tokens(8, 64).numpy())

    def search(**more):
        return CacheSearch(compose("search_cache", jobs()["search_cache"].options, words(**changes | more)))

    assert search()._inputs.statistics == {}
    file = checkpoint.path / FOLDER / file_name(method)
    file.parent.mkdir()
    write_layers(file, [{"scale": torch.ones(1)} for _ in range(2)], note)
    with_statistics = search()
    assert with_statistics._inputs.statistics == {file.name: file}
    without = search(statistics="prompt")
    assert without._inputs.statistics == {}
    # What was measured without them is not what is measured with them.
    assert with_statistics._inputs.key != without._inputs.key
    with pytest.raises(UserError, match="does not exist: hasten calibrate_cache makes statistics of cache=KVQuant"):
        search(statistics=tmp_path)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"levels": "[kivvi]"}, "levels=kivvi is none of"),
        ({"levels": "[full]"}, "levels=[full] leave no choice"),
        ({"levels": "[full,snapkv]"}, "levels=snapkv keeps a budget: write snapkv:budget=0.25"),
        ({"levels": "[full,'kivi:budget=0.5']"}, "cache=KIVI has no budget"),
        ({"levels": "[full,'snapkv:budget=true']"}, "budget=True is no number"),
        ({"levels": "[full,minicache]"}, "cache=MiniCache needs several layers"),
        ({"levels": "[full,'double_sparsity:budget=0.5']"}, "level double_sparsity:budget=0.5 holds all tokens"),
        ({"budget": "[0]"}, "budget=[0.0] is wrong"),
        ({"allocator": "baq"}, "allocator=baq spreads bits"),
        ({"context": 100000}, "context=100000 is too long"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(folder, capsys, changes, wrong):
    kept = {key: value for key, value in OPTIONS.items() if not key.startswith("allocator.")}
    assert main(["search_cache", *(f"{key}={value}" for key, value in (kept | changes).items())]) == 2
    assert wrong in capsys.readouterr().err
    assert list(folder.iterdir()) == []
