"""Whether every node sees the files, on two nodes of one machine.

Both see the same disk: what a node does not see is simulated by what the look-up says there.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime import visibility
from hasten.cluster.runtime.prefork import forked_workers
from hasten.cluster.runtime.ray_processes import fewer_processes
from hasten.cluster.runtime.visibility import check, state, unseen

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.ray


def attempts(folder: Path) -> dict[str, str]:
    """Refusals (empty where there is none) on a cluster of two nodes, of this process and of `second`."""
    import ray
    from ray.cluster_utils import Cluster

    stack = ExitStack()
    stack.enter_context(forked_workers())
    stack.enter_context(fewer_processes())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1).node_id
    ray.init(address=cluster.address, log_to_driver=False)

    def blind(expected):
        """Sees nothing; runs on the second node, and nowhere else."""
        import ray

        assert ray.get_runtime_context().get_node_id() == second
        return list(expected)

    def broken(expected):
        raise ModuleNotFoundError("No module named 'accel'")

    def refusal(*arguments):
        try:
            (check if len(arguments) == 2 else visibility._check)(*arguments)
        except UserError as error:
            return str(error)
        return ""

    model, output = {"model": folder}, {"output": folder / "new" / "out"}
    found = {
        "shared": refusal(model, {"output": folder / "new" / "out", "levels": folder}),
        "input": refusal(model, {}, blind),
        "output": refusal({}, output, blind),
        "broken": refusal(model, {}, broken),
        "nowhere": refusal({}, {"output": Path("/proc/hasten/out")}),
    }
    ray.shutdown()
    cluster.shutdown()
    stack.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shared")
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def refusals(folder):
    """In a process of its own: Ray is in one cluster at a time, and the other tests have theirs."""
    program = (
        "import json, pathlib; from tests.cluster.runtime.test_visibility import attempts; "
        f"print(json.dumps(attempts(pathlib.Path({str(folder)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_state_of_a_folder_is_the_sizes_of_its_finished_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.tmp").write_text("half")
    (tmp_path / "nested").mkdir()
    assert state(tmp_path) == {"config.json": 2}
    assert state(tmp_path / "config.json") == 2
    assert state(tmp_path / "missing") is None


def test_what_is_missing_or_of_another_size_is_unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(visibility, "_SECONDS_TO_APPEAR", 0.0)
    (tmp_path / "here").write_text("1")
    expected = {str(tmp_path / "here"): 1, str(tmp_path / "gone"): 1, str(tmp_path): {"here": 2}}
    assert unseen(expected) == [str(tmp_path / "gone"), str(tmp_path)]


def test_a_file_that_appears_late_is_seen(tmp_path, monkeypatch):
    late = tmp_path / "late"
    monkeypatch.setattr("time.sleep", lambda seconds: late.touch())
    assert unseen({str(late): 0}) == []


@pytest.mark.ray
def test_with_one_node_nothing_is_looked_up(ray_session, tmp_path):
    def never(expected):
        raise AssertionError

    visibility._check({}, {"output": tmp_path / "out"}, never)
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_folders_that_both_nodes_share_are_accepted_and_left_as_they_were(refusals, folder):
    assert refusals["shared"] == ""
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.ray
@pytest.mark.parametrize("option", ["input", "output"])
def test_what_the_second_nodes_look_up_does_not_find_is_refused_in_one_line(refusals, folder, option):
    named = f"model={folder}" if option == "input" else f"output={folder}/new/out"
    assert refusals[option].startswith(f"{named} is not the same on node ")
    assert "cache=FOLDER" in refusals[option]
    assert "\n" not in refusals[option]


@pytest.mark.ray
def test_a_node_that_cannot_run_the_look_up_is_refused(refusals):
    assert "cannot run hasten (ModuleNotFoundError: No module named 'accel')" in refusals["broken"]
    assert "\n" not in refusals["broken"]


@pytest.mark.ray
def test_an_output_where_nothing_can_be_written_is_refused(refusals):
    assert refusals["nowhere"].startswith("output=/proc/hasten/out cannot be written to (")
