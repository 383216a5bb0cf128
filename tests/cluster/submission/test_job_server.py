"""Jobs on a head that `ray start` has started, with Ray's token authentication on."""

import http.server
import shlex
import signal
import subprocess
import sys
import threading
import types

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime.session import session
from hasten.cluster.submission import job_server as submission
from hasten.cluster.submission.job_server import JobServer, dashboard_url
from hasten.jobs.cli.main import main
from tests.cluster.submission import head as heads
from tests.compression.local import contents
from tests.traps import imported, set_traps

pytestmark = pytest.mark.ray

COMPRESS = [
    "compress",
    "output=out",
    "calibration.sequences=8",
    "calibration.sequence_length=64",
    "evaluation.sequences=0",
    "workers=1",
]


@pytest.fixture(scope="module")
def head():
    with heads.started() as found:
        yield found


def test_a_submitted_job_writes_the_same_bytes_as_a_local_one_and_imports_nothing_in_its_folder(
    head, tmp_path, monkeypatch, ray_session
):
    far, here = tmp_path / "far", tmp_path / "a folder's name"
    far.mkdir()
    here.mkdir()
    set_traps(far, "module")
    done = head.hasten("submit", "--name", "same", "--workdir", str(far), *COMPRESS, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout.splitlines()[-1].removeprefix("report: ")
    assert (far / report).is_file()
    assert imported(far) == []
    assert (far / "runs" / "mlflow.db").is_file()
    assert list(here.iterdir()) == []
    monkeypatch.chdir(here)
    assert main(COMPRESS) == 0
    assert contents(far / "out") == contents(here / "out")

    status = head.hasten("status", "same", cwd=here).stdout
    assert "status:    SUCCEEDED, has finished\nexit code: 0\n" in status
    assert f"command:   hasten compress output={far / 'out'} " in status
    table = head.hasten("status", cwd=here).stdout.splitlines()
    assert table[0].split() == ["ID", "STATUS", "STARTED", "SECONDS", "COMMAND"]
    assert [line.split()[:2] for line in table[1:] if line.startswith("same")] == [["same", "SUCCEEDED"]]
    assert head.hasten("logs", "same", cwd=here).stdout == done.stdout


@pytest.mark.soak
def test_a_job_of_the_head_s_own_code_imports_nothing_in_its_folder(head, tmp_path):
    set_traps(tmp_path, "module")
    small = [word for word in COMPRESS if "sequences=8" not in word]
    words = ["--name", "traps", "--env", "none", *small, "calibration.sequences=2"]
    done = head.hasten("submit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert imported(tmp_path) == []


def test_a_job_that_fails_gives_its_exit_code_and_its_one_line(head, tmp_path):
    done = head.hasten("submit", "--name", "fails", "evaluate", "model=/nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("hasten: error: model='/nowhere' does not exist")
    again = head.hasten("submit", "--name", "fails", "evaluate", cwd=tmp_path)
    assert again.returncode == 2
    assert "a job with this name exists already" in again.stderr.splitlines()[-1]
    followed = head.hasten("logs", "fails", "--follow", cwd=tmp_path)
    assert (followed.returncode, followed.stdout) == (2, done.stdout)


def test_a_folder_that_the_head_does_not_have_is_one_line(head, tmp_path):
    done = head.hasten("submit", "--workdir", "/no/such folder", "evaluate", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith(
        "hasten: error: --workdir /no/such folder is no folder on the cluster"
    )


def test_ctrl_c_leaves_a_job_running_until_it_is_stopped_by_its_id(head, tmp_path):
    words = ["submit", "--address", head.url, "--name", "long", "--env", "none", "pretrain", "output=models"]
    command = [sys.executable, "-m", "hasten", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def listen():
        """Tests that were started in the background hand on that SIGINT is ignored."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(command, cwd=tmp_path, env=head.environment(), preexec_fn=listen, **pipes) as process:
        assert any(line.startswith("Running entrypoint for job long: ") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert f"long keeps running: hasten logs --follow --address {head.url} long shows it, hasten stop " in err
    assert "status:    RUNNING, is running\n" in head.hasten("status", "long", cwd=tmp_path).stdout

    stopped = head.hasten("stop", "long", cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, "long was stopped\n")
    again = head.hasten("stop", "long", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "long was stopped\n")
    assert head.hasten("logs", "long", "--follow", cwd=tmp_path).returncode == 130


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_an_unknown_job_is_one_line(head, tmp_path, command):
    done = head.hasten(command, "nobody", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"hasten: error: there is no job nobody at {head.url}: hasten status lists all jobs\n"


TOKENS = {
    "missing": ({"RAY_AUTH_TOKEN_PATH": None}, "wants a token, and there is none: put the cluster's token"),
    "no file": ({"RAY_AUTH_TOKEN_PATH": "nofile"}, "wants a token, and RAY_AUTH_TOKEN_PATH=nofile is no file with a"),
    "wrong file": (
        {"RAY_AUTH_TOKEN_PATH": "wrong"},
        "refuses the token of the file that RAY_AUTH_TOKEN_PATH=wrong names",
    ),
    "wrong default file": (
        {"RAY_AUTH_TOKEN_PATH": None, "HOME": "home"},
        "home/.ray/auth_token: put the cluster's token",
    ),
    "wrong variable": ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token of RAY_AUTH_TOKEN: put the cluster's token"),
    "switched off": (
        {"RAY_AUTH_MODE": "disabled"},
        "wants a token, but RAY_AUTH_MODE=disabled: set RAY_AUTH_MODE=token",
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_missing_or_wrong_token_is_one_line_that_names_file_and_variable(head, tmp_path, case):
    changes, expected = TOKENS[case]
    (tmp_path / "wrong").write_text("0" * 64)
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("0" * 64)
    done = head.hasten("status", cwd=tmp_path, **({"HOME": str(tmp_path)} | changes))
    assert done.returncode == 2
    assert done.stderr.startswith(f"hasten: error: address={head.url} ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    if "put the cluster's token" in expected:
        assert ".ray/auth_token, into a file that RAY_AUTH_TOKEN_PATH names, or into RAY_AUTH_TOKEN" in done.stderr


JOIN = """
import sys
import ray
import ray._private.utils
ray.__version__, python = sys.argv[2:]
ray._private.utils.compute_version_info = lambda: (ray.__version__, python)
from hasten.cluster.runtime.session import session
from hasten.cluster.submission.job_server import JobServer
try:
    if sys.argv[1].startswith("http"):
        JobServer(sys.argv[1])
    else:
        with session(sys.argv[1], 1):
            print(ray.cluster_resources()["CPU"])
except Exception as error:
    print(type(error).__name__, error)
"""


def joined(head, tmp_path, address, ray_version=None, python=None, **changes):
    """What a process with these versions prints when it joins or asks the cluster."""
    import platform

    import ray

    versions = (ray_version or ray.__version__, python or platform.python_version())
    done = head.python("-c", JOIN, address, *versions, cwd=tmp_path, **changes)
    assert done.returncode == 0
    assert done.stderr == "", "Ray's own lines are not shown"
    return done.stdout


def test_a_session_joins_with_the_token_and_without_a_mode(head, tmp_path):
    assert joined(head, tmp_path, f"127.0.0.1:{head.port}") == "2.0\n"


def test_a_session_with_a_wrong_token_is_refused_in_one_line(head, tmp_path):
    said = joined(head, tmp_path, f"127.0.0.1:{head.port}", RAY_AUTH_TOKEN="wrong")
    assert said.startswith(f"UserError address=127.0.0.1:{head.port} refuses the token of RAY_AUTH_TOKEN: ")


def test_another_version_of_ray_or_python_is_refused_with_both(head, tmp_path):
    import ray

    address = f"127.0.0.1:{head.port}"
    theirs = ray.__version__
    for each in (address, head.url):
        said = joined(head, tmp_path, each, ray_version="2.50.1")
        assert said.startswith(f"UserError address={each} runs Ray {theirs}, and this machine Ray 2.50.1: ")
        assert f"pip install 'ray[default]=={theirs}' here" in said
    said = joined(head, tmp_path, address, python="3.99.1")
    assert "runs Python 3." in said
    assert ", and this machine Python 3.99.1: they must be the same" in said


def test_an_address_where_nothing_listens_says_how_to_start_a_cluster(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    [port] = heads._free_ports(1)
    with pytest.raises(UserError, match=rf"address=127.0.0.1:{port} does not answer .*`ray start --head`"):
        session(f"127.0.0.1:{port}", 1).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"address=auto \(RAY_ADDRESS=127.0.0.1:{port}\) does not answer"):
        session("auto", 1).__enter__()
    with pytest.raises(UserError, match=rf"address=http://127.0.0.1:{port} does not answer .*`ray start --head`"):
        JobServer(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="is a dashboard, to which `hasten submit --address` sends jobs"):
        session(f"http://127.0.0.1:{port}", 1).__enter__()


@pytest.fixture
def some_server():
    """Address of a web server that is not Ray's."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_rays_is_refused(some_server, monkeypatch):
    with pytest.raises(UserError, match=f"address=http://{some_server} is no Ray dashboard: start Ray there"):
        JobServer(some_server)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"address={some_server} is a dashboard, to which `hasten submit"):
        session(some_server, 1).__enter__()


class Dropping:
    """A client whose connection is lost while it submits, the first time; taken: whether the job got through."""

    def __init__(self, taken):
        self.taken, self.calls = taken, []

    def submit_job(self, **job):
        self.calls.append(job)
        if len(self.calls) == 1:
            raise ConnectionError("Remote end closed connection without response")
        if self.taken:
            raise RuntimeError("Request failed with status code 500: Job with submission_id mine already exists.")

    def get_job_info(self, name):
        return types.SimpleNamespace(metadata=self.calls[0]["metadata"])


@pytest.mark.parametrize("taken", [False, True])
def test_a_job_is_sent_again_after_a_lost_connection_and_runs_once(monkeypatch, taken):
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0)
    server = object.__new__(JobServer)
    server.url, server._client = "http://head:8265", Dropping(taken)
    assert server.submit(["compress", "calibration.source=it's"], "/a b", "none", name="mine") == "mine"
    first, second = server._client.calls
    assert first == second
    assert shlex.split(first["entrypoint"])[4:] == ["/a b", "compress", "calibration.source=it's"]


class Streaming:
    """Client of a job server whose streams end early: the first by a lost connection, the second before the end."""

    LOG = "one\ntwo\nreport: path\n"

    def __init__(self):
        self.streams = iter([["one\n", None], ["one\ntwo\n"]])
        self.asked = 0

    async def tail_job_logs(self, name):
        for text in next(self.streams):
            if text is None:
                raise OSError("connection lost")
            yield text

    def get_job_info(self, name):
        self.asked += 1
        return types.SimpleNamespace(
            submission_id=name,
            metadata={},
            entrypoint="",
            status="RUNNING" if self.asked == 1 else "SUCCEEDED",
            message="",
            start_time=None,
            end_time=None,
            driver_exit_code=0,
        )

    def get_job_logs(self, name):
        return self.LOG


def test_all_that_a_job_printed_is_written_once_although_streams_end_early(monkeypatch):
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0)
    server = object.__new__(JobServer)
    server.url, server._client = "http://head:8265", Streaming()
    written = []
    assert server.follow("mine", written.append).is_over
    assert "".join(written) == Streaming.LOG
    assert next(server._client.streams, None) is None
    written.clear()
    assert server.follow("mine", written.append).is_over
    assert "".join(written) == Streaming.LOG, "a job that has ended is not streamed"


URLS = {
    "http://head:8265": "http://head:8265",
    "http://head:8265/": "http://head:8265",
    "https://head/ray": "https://head/ray",
    "head:8000": "http://head:8000",
    "head": "http://head:8265",
    "http://head": "http://head:8265",
    "[::1]": "http://[::1]:8265",
    None: "http://127.0.0.1:8265",
    "auto": "http://127.0.0.1:8265",
}


@pytest.mark.parametrize("address", URLS)
def test_addresses_are_those_of_dashboards(monkeypatch, address):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert dashboard_url(address) == URLS[address]


def test_without_an_address_rays_variables_count_but_never_before_a_given_one(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for text in ("10.0.0.1:6379", "ray://10.0.0.1:10001", "http://10.0.0.1:8265"):
        monkeypatch.setenv("RAY_ADDRESS", text)
        assert dashboard_url(None) == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example")
    assert dashboard_url("auto") == "https://ray.example"
    assert dashboard_url("head") == "http://head:8265"


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(UserError, match="expected http://HOST:8265, HOST:8265 or auto"):
        dashboard_url("ray://head:10001")
