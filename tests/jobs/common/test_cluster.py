"""What a job's workers ask of the cluster comes from its options."""

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.cli.compose import compose
from hasten.jobs.common.cluster import worker_resources
from hasten.jobs.descriptors.registry import jobs

JOBS = [name for name, job in jobs().items() if hasattr(job.options, "worker_gpus")]


def composed(job, *words):
    return compose(job, jobs()[job].options, list(words))


def test_every_job_that_hands_work_to_actors_in_ray_says_what_these_need():
    assert JOBS == [
        "compress",
        "kv_heads",
        "levels",
        "search",
        "evaluate",
        "decode",
        "calibrate_cache",
        "cache",
        "search_cache",
    ]


@pytest.mark.parametrize("job", JOBS)
def test_on_a_cpu_a_worker_needs_its_threads_alone(job):
    assert worker_resources(composed(job, "device=cpu", "threads=3")).bundle == {"CPU": 3, "GPU": 0}


def test_one_gpu_each_unless_workers_share_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert worker_resources(composed("compress", "device=cuda")).gpus == 1
    assert worker_resources(composed("compress", "device=cuda", "worker_gpus=0.5")).gpus == 0.5
    with pytest.raises(UserError, match=r"worker_gpus=0 leaves the workers no GPU: use device=cpu"):
        worker_resources(composed("compress", "device=cuda", "worker_gpus=0"))
    assert worker_resources(composed("compress", "device=cpu", "worker_gpus=0")).gpus == 0


@pytest.mark.parametrize("job", JOBS)
def test_memory_is_reserved_where_it_is_given_also_by_the_points_of_a_sweep(job):
    config = composed(job, "device=cpu", "workers=2", "worker_memory=2GiB")
    assert worker_resources(config).memory == 2 * 2**30
    workers = jobs()[job].needs_of(config).actors[:2]
    assert [actor["memory"] for actor in workers] == [2.0 * 2**30] * 2


def test_a_size_that_is_none_is_refused_by_name():
    with pytest.raises(UserError, match=r"worker_memory=much is wrong: expected bytes such as 80GB"):
        worker_resources(composed("evaluate", "worker_memory=much"))
