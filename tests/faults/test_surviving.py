"""Nodes, actors and processes are killed, stopped or short of memory, and the results are the same."""

import dataclasses
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.search.samples import Sample
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.errors import UserError
from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.verifier import DecodeSpec
from hasten.cluster.programs import evaluation
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.evaluation import measure
from hasten.cluster.programs.search import Evaluators
from hasten.cluster.runtime.actor_pool import ActorPool, Wait
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches, StragglerDetector, is_actors_own, is_loss, is_out_of_memory
from hasten.cluster.runtime.tasks import task_results
from tests.cluster import searching
from tests.cluster.hungry import HungryDrafter, HungryFitness, HungryQuantizer
from tests.cluster.hungry import task as hungry_task
from tests.cluster.processes import processes, stopped
from tests.compression import local
from tests.faults import two_nodes
from tests.models import tiny

pytestmark = pytest.mark.faults
TOKENS = tiny.tokens(9)
SAMPLE = Sample(tuple((number, 24) for number in range(6)))
REQUESTS = [Request(f"prompt {number}", row, 12 + number) for number, row in enumerate(tiny.tokens(12, 8).tolist())]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama") / "m", "llama", dtype=torch.bfloat16, num_hidden_layers=4)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A model for evaluators, candidates, and what one process finds."""
    model, genomes, alone = searching.make(source, tmp_path_factory.mktemp("levels") / "l", TOKENS, 12)
    return model, genomes, alone.evaluate([*genomes, *(genome[::-1] for genome in genomes)], SAMPLE)


@pytest.fixture(scope="module")
def spec(source):
    return DecodeSpec(source, tiny.VOCABULARY, SampleAndMatch(), TokenRecycling(), in_flight=2, draft_length=Fixed(8))


@pytest.fixture(scope="module")
def completions(spec):
    """Completions that one process decodes plainly, by id."""
    torch.set_num_threads(1)
    engine = Engine(load_target(spec.target, spec.dtype))
    return {result.id: result.token_ids for result in engine.decode(REQUESTS)}


@pytest.fixture(scope="module")
def sums(source):
    """Windows, and their sums part by part."""
    cut = windows(tiny.tokens(16), 24)
    parts = [evaluate(Architecture(Checkpoint(source)), cut.part(part, 2), batch=1) for part in range(2)]
    return cut, sum(parts, Sums())


@pytest.fixture(scope="module")
def cluster():
    """A function that calls another where the cluster is."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(two_nodes.start).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
        pool.submit(two_nodes.end).result()


@pytest.mark.ray
def test_a_compression_that_loses_a_node_ends_with_the_same_bytes(source, tmp_path, cluster):
    local.compress(local.settings(source, tmp_path / "alone"), TOKENS)
    chosen = local.settings(source, tmp_path / "out")
    blocks, restarts, lines = cluster(two_nodes.compress, chosen, TOKENS)
    assert local.contents(tmp_path / "out") == local.contents(tmp_path / "alone")
    assert blocks == [0, 1, 2, 3], "each once"
    assert restarts == 1
    assert "the replacement of a calibrator has no CPUs of its own: all 2 actors share the remaining 1 CPUs" in lines


@pytest.mark.ray
def test_a_search_that_loses_a_node_finds_the_same(made, tmp_path, cluster):
    model, genomes, expected = made
    found, restarts, lines = cluster(two_nodes.search, model, genomes, SAMPLE, tmp_path / "hangs")
    assert found == expected
    assert restarts == 1
    assert any(line.startswith("lost an evaluator") for line in lines)


@pytest.mark.ray
def test_prompts_of_a_lost_node_are_decoded_on_the_other(spec, completions, tmp_path, cluster):
    found, restarts, lines = cluster(two_nodes.decode, spec, REQUESTS, tmp_path / "hangs")
    assert found == completions
    assert restarts == 1
    assert any(line.startswith("lost a verifier") for line in lines)


@pytest.mark.ray
def test_windows_of_a_lost_node_are_evaluated_on_the_other(source, sums, tmp_path, cluster):
    cut, expected = sums
    found, lines = cluster(two_nodes.evaluate, source, cut, tmp_path / "begun")
    assert dataclasses.astuple(found) == dataclasses.astuple(expected)
    assert any(line.startswith("lost a task") for line in lines)


@pytest.mark.ray
def test_the_workers_of_a_lost_node_end_with_it(tmp_path, cluster):
    assert cluster(two_nodes.survivors, tmp_path / "worker") == []


@pytest.mark.ray
def test_a_sweep_that_loses_a_node_finishes_each_point_once(tmp_path, cluster):
    endings, done = cluster(two_nodes.sweep, tmp_path)
    assert endings == ["finished"] * 8
    assert sorted(done) == [str(number) for number in range(8)]


@pytest.mark.ray
def test_a_pool_that_the_nodes_do_not_hold_shares_what_they_have(ray_session):
    import ray

    asked = []

    class Member:
        def usage(self):
            return None

    def start(index, cpus):
        asked.append(cpus)
        return ray.remote(Member).options(num_cpus=cpus).remote()

    pool = ActorPool("a worker", 2, ActorResources(1000), start)
    pool.begin()
    assert pool.alive == []
    pool.fill()
    assert asked == [0.0, 0.0]
    assert ray.get([actor.usage.remote() for actor in pool.actors], timeout=60) == [None, None]
    pool.end()


def test_a_successor_has_cpus_of_its_own_where_a_node_has_them(cluster):
    cpus, restarts, lines = cluster(two_nodes.succeed)
    assert cpus == [1.0, 1.0]
    assert restarts == 1
    assert len(lines) == 1
    assert lines[0].startswith("lost a worker (")


@pytest.mark.ray
def test_a_full_object_store_spills_and_the_bytes_are_the_same(tmp_path):
    # Sums of 3584 columns are 27 MB: of two blocks and two calibrators they are more than the store's 80.
    source = tiny.save(tmp_path / "wide", "llama", dtype=torch.bfloat16, intermediate_size=3584)
    local.compress(local.settings(source, tmp_path / "alone", propagate="original"), TOKENS)
    chosen = local.settings(source, tmp_path / "out", propagate="original")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        spilled = pool.submit(two_nodes.compress_in_little_room, chosen, TOKENS).result()
    assert spilled > 0
    assert local.contents(tmp_path / "out") == local.contents(tmp_path / "alone")


@pytest.mark.ray
def test_a_calibrator_that_stands_still_holds_up_no_solve(source, tmp_path, ray_session):
    # Without statistics: those of its own sequences nobody else can take.
    local.compress(local.settings(source, tmp_path / "alone", RoundToNearest()), TOKENS)
    chosen = local.settings(source, tmp_path / "out", RoundToNearest())
    work = CalibrationPass(chosen, None, 2)
    work.task.output.open(chosen.fingerprint(work.task.checkpoint, None), overwrite=False)
    states = []

    def stop(count, row):
        if count == 1:
            states.append(processes("Calibrator")[0])
            states[0].suspend()
        else:
            states.append(states[0].status())

    report = work.run(stop)
    assert states[1:] == [psutil.STATUS_STOPPED] * 3
    assert report.restarts == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


@pytest.mark.ray
def test_an_evaluator_that_stands_still_holds_up_no_search(made, ray_session):
    model, genomes, expected = made
    pool = Evaluators(model, 2)
    assert pool(genomes[:2], SAMPLE) == expected[:2]
    with stopped(processes("Evaluator")[0]) as process:
        assert pool(genomes, SAMPLE) == expected[: len(genomes)]
        assert process.status() == psutil.STATUS_STOPPED
    pool.close()
    assert pool.restarts == 0


@pytest.mark.ray
def test_a_verifier_that_stands_still_holds_up_no_prompt(spec, completions, ray_session):
    pool = Decoders(spec, 2, placement="private")
    stream = pool(REQUESTS)
    results = [next(stream)]
    with stopped(processes("VerifierActor")[0]) as process:
        results += stream
        assert {result.id: result.token_ids for result in results} == completions
        assert len(results) == len(REQUESTS)
        assert process.status() == psutil.STATUS_STOPPED
    pool.close()
    assert pool.restarts == 0


@pytest.mark.ray
def test_a_task_that_stands_still_holds_up_no_evaluation(source, sums, tmp_path, ray_session, monkeypatch):
    cut, expected = sums
    usual, mark = evaluation._evaluate, tmp_path / "stopped"

    def task(*arguments):
        try:
            with mark.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return usual(*arguments)
        os.kill(os.getpid(), signal.SIGSTOP)
        return usual(*arguments)

    monkeypatch.setattr(evaluation, "_evaluate", task)
    found = measure(source, None, cut, 2, batch=1)
    assert dataclasses.astuple(found.sums) == dataclasses.astuple(expected)
    process = psutil.Process(int(mark.read_text()))
    assert process.status() == psutil.STATUS_STOPPED
    process.kill()


@pytest.mark.ray
def test_a_compression_out_of_memory_goes_on_with_half_the_batch_once(source, tmp_path, ray_session, caplog):
    local.compress(local.settings(source, tmp_path / "alone", batch=1), TOKENS)
    for times in (1, 2):
        hungry = HungryQuantizer(plate=str(tmp_path / f"plate{times}"), times=times)
        chosen = local.settings(source, tmp_path / f"out{times}", hungry, batch=2)
        work = CalibrationPass(chosen, TOKENS, 1)
        work.task.output.open(chosen.fingerprint(work.task.checkpoint, TOKENS), overwrite=False)
        if times == 1:
            work.run()
        else:
            with pytest.raises(
                UserError,
                match=r"out of memory with calibration.batch=1 \(half of 2\): use propagate=quantized, a smaller",
            ):
                work.run()
    assert shards(tmp_path / "out1") == shards(tmp_path / "alone")
    assert "with calibration.batch=2: trying once more with 1; the last bits of the result may differ" in caplog.text


@pytest.mark.ray
def test_a_search_out_of_memory_goes_on_with_half_the_batch(made, tmp_path, ray_session):
    model, genomes, expected = made
    fitness = HungryFitness(plate=str(tmp_path / "plate"))
    pool = Evaluators(dataclasses.replace(model, fitness=fitness, batch=2), 1)
    assert pool(genomes[:3], SAMPLE) == expected[:3]
    assert pool.restarts == 1
    pool.close()


@pytest.mark.ray
def test_decoding_out_of_memory_goes_on_with_half_as_many_in_flight(spec, completions, tmp_path, ray_session):
    pool = Decoders(dataclasses.replace(spec, drafter=HungryDrafter(plate=str(tmp_path / "plate"))), 1)
    assert {result.id: result.token_ids for result in pool(REQUESTS)} == completions
    assert pool.restarts == 1
    pool.close()


@pytest.mark.ray
def test_a_task_out_of_memory_runs_again_with_half_the_batch_once(tmp_path, ray_session):
    def run(times):
        batches = Batches("batch", 8, "use fewer workers")
        plate = str(tmp_path / f"plate{times}")
        needs = ActorResources()
        return list(task_results(hungry_task, lambda _: (batches.of(0), plate, times), 1, 1, needs, batches))

    assert run(1) == [(0, 4)]
    with pytest.raises(
        UserError, match=r"a task ran out of memory with batch=4 \(half of 8\): set batch=2, or use fewer"
    ):
        run(2)


def test_a_batch_is_halved_once_for_each_worker_and_one_not_at_all():
    batches = Batches("search.batch", 4, "use fewer workers")
    batches.halve(1, "an evaluator")
    assert [batches.of(worker) for worker in range(2)] == [4, 2]
    expected = (
        r"an evaluator ran out of memory with search.batch=2 \(half of 4\): set search.batch=1, or use fewer workers"
    )
    with pytest.raises(UserError, match=expected):
        batches.halve(1, "an evaluator")
    with pytest.raises(UserError, match=r"a verifier ran out of memory with in_flight=1: use fewer workers"):
        Batches("in_flight", 1, "use fewer workers").halve(0, "a verifier")


def test_what_is_lost_and_what_lacks_memory_is_known_by_rays_errors():
    from ray import exceptions

    def wrapped(cause):
        return exceptions.RayTaskError("solve", "Traceback", cause)

    def raised(cause):
        return wrapped(cause).as_instanceof_cause()

    lost = [
        exceptions.ActorDiedError(),
        exceptions.ActorUnavailableError("gone", None),
        exceptions.ObjectLostError("00", None, ""),
        exceptions.OwnerDiedError("00", None, ""),
        exceptions.ObjectReconstructionFailedError("00"),
        exceptions.WorkerCrashedError(),
        exceptions.NodeDiedError("gone"),
    ]
    assert all(map(is_loss, lost))
    assert [is_actors_own(error) for error in lost] == [True, True, False, False, False, False, False]
    # What a call was given is lost.
    assert all(is_loss(raised(error)) and not is_actors_own(raised(error)) for error in lost)
    assert not any(map(is_out_of_memory, lost))
    causes = [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    assert all(map(is_out_of_memory, [exceptions.OutOfMemoryError("low"), *map(raised, causes)]))
    assert is_out_of_memory(wrapped(wrapped(MemoryError())))
    others = [raised(ValueError()), exceptions.LocalRayletDiedError(), exceptions.ActorDiedError(wrapped(OSError()))]
    assert not any(is_loss(error) or is_out_of_memory(error) for error in others)


def test_a_call_is_late_after_the_longest_one_half_again_and_a_second_at_least():
    detector = StragglerDetector()
    assert not detector.is_late(1e9), "nothing is known yet"
    detector.note(0.1)
    assert (detector.is_late(0.9), detector.is_late(1.0)) == (False, True)
    detector.note(4.0)
    assert (detector.is_late(5.9), detector.is_late(6.0)) == (False, True)
    for _ in range(32):
        detector.note(0.1)
    assert detector.is_late(1.0), "the longest one is long ago"


def test_gpus_that_do_not_come_back_are_waited_for_so_long(monkeypatch):
    monkeypatch.setenv("HASTEN_NODE_WAIT_SECONDS", "0")
    with pytest.raises(UserError, match=r"a calibrator needs 1 GPU\(s\), which no node has had for 0 s .* is kept"):
        Wait("a calibrator").go_on("1 GPU(s)")


def shards(folder):
    """Tensors' files of a checkpoint."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
