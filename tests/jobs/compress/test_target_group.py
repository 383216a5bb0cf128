"""Groups of ranks in the jobs that run a model block by block: what cannot work is refused before Ray starts."""

import pytest

from hasten.cluster.actors.divided_model import TENSOR_PARALLEL, ZERO3, Division
from hasten.cluster.runtime import process_group
from hasten.jobs.cli.main import main
from hasten.jobs.compress import run as compress
from hasten.jobs.evaluate import run as evaluate
from tests.costs.rates import RATES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compress target_group.size=2 target_group.mode=tensor_parallel", "use target_group.mode=zero3"),
        ("compress target_group.size=2 target_group.offload=/nvme", "target_group.offload=/nvme: a folder is for"),
        ("compress target_group.size=8", "workers=2 of target_group.size=8 is more than the 8 chunks"),
        ("compress target_group.size=0", "target_group.size"),
        ("evaluate target_group.size=3", "target_group.size=3 does not divide model.layers.0.self_attn.q_proj of"),
        ("evaluate target_group.size=2 target_group.offload=cpu", "is an option of target_group.mode=zero3"),
        ("evaluate target_group.size=2 tasks=[arc_easy]", "tasks=[arc_easy] are run by lm-eval, in one process"),
        ("pretrain target_group.size=2", "unknown option 'target_group.size'"),
        ("plan compress target_group.size=2 target_group.mode=tensor_parallel", "use target_group.mode=zero3"),
        ("plan compress target_group.size=8", "workers=2 of target_group.size=8 is more than the 8 chunks"),
        ("plan evaluate target_group.size=3", "target_group.size=3 does not divide"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr(process_group, "find_spec", lambda name: True)
    monkeypatch.setattr(evaluate, "check_tasks", lambda tasks: None)
    monkeypatch.setattr("hasten.jobs.common.cluster.session", None)
    monkeypatch.setattr("hasten.cluster.runtime.rates.measure", lambda *_: RATES)
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("job", "words", "division"),
    [
        (compress, "compress target_group.size=2", Division(2, ZERO3)),
        (compress, "compress target_group.offload=cpu", Division(1, ZERO3, "cpu")),
        (evaluate, "evaluate target_group.size=2", Division(2, TENSOR_PARALLEL)),
    ],
)
def test_the_cluster_is_asked_for_all_ranks_and_the_work_is_divided(monkeypatch, job, words, division):
    class Reached(Exception):  # noqa: N818 (not an error: nothing behind it is run)
        pass

    seen = []

    def session(config, cpus, *paths, group, **others):
        seen.append((cpus, group.size))
        raise Reached

    chosen = job.block_division
    monkeypatch.setattr(process_group, "find_spec", lambda name: True)
    monkeypatch.setattr(job, "block_division", lambda *given, **named: seen.append(chosen(*given, **named)) or seen[-1])
    monkeypatch.setattr(job, "cluster_session", session)
    with pytest.raises(Reached):
        main([*words.split(), "workers=3"])
    assert seen == [division, (3 * division.size, division.size)]
