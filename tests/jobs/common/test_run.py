import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hasten.accel.errors import UserError
from hasten.cluster.storage.naming import called
from hasten.jobs.cli.main import main
from hasten.jobs.common import logs
from hasten.jobs.common.logs import LOG_FILE
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.run import start


@pytest.fixture
def job(monkeypatch):
    """Puts a function in the place of the job `evaluate`."""

    def replace(function):
        monkeypatch.setitem(sys.modules, "hasten.jobs.evaluate.run", SimpleNamespace(run=function))

    return replace


def test_the_last_line_is_the_report_and_the_folder_holds_config_and_log(job, capsys):
    def work(config):
        folder = start(config)
        logging.getLogger("hasten.jobs.evaluate.run").info("half way")
        print("a table")
        return folder / "report.json"

    job(work)
    assert main(["evaluate", "batch=3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("report: runs/evaluate/")
    assert "half way" in captured.err
    folder = Path(captured.out.splitlines()[-1].removeprefix("report: ")).parent
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["batch"] == 3
    assert settings["run_dir"] == str(folder)
    assert "half way" in (folder / LOG_FILE).read_text()


def test_log_lines_name_files_as_the_user_did(job, folder, capsys):
    def work(config):
        start(config)
        with called({folder / "copy": "s3://bucket/llama"}):
            logging.getLogger("hasten.jobs.evaluate.run").info("reading %s", folder / "copy/config.json")

    job(work)
    assert main(["evaluate", "run_dir=here"]) == 0
    for text in (capsys.readouterr().err, Path("here", LOG_FILE).read_text()):
        assert "reading s3://bucket/llama/config.json" in text


def test_a_users_mistake_found_late_is_one_line_and_its_traceback_is_in_the_log(job, capsys):
    def work(config):
        start(config)
        raise UserError("no space left:\nmake some and start again")

    job(work)
    assert main(["evaluate", "run_dir=here"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hasten: error: no space left: make some and start again\n"
    assert "Traceback" in Path("here", LOG_FILE).read_text()


def test_a_mistake_found_early_leaves_nothing(job, folder):
    def work(config):
        raise UserError("model=/x is no folder")

    job(work)
    assert main(["evaluate"]) == 2
    assert list(folder.iterdir()) == []


def test_an_actors_mistake_is_told_without_the_remote_traceback(job, capsys):
    class RemoteError(UserError):
        """What Ray raises: the actor's exception is its cause, its text the traceback."""

        cause = UserError("layer 3 has NaN")

    def work(config):
        raise RemoteError("Traceback\nof another process")

    job(work)
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err == "hasten: error: layer 3 has NaN\n"


def test_a_mistake_of_ours_keeps_its_traceback(job):
    def work(config):
        start(config)
        raise ZeroDivisionError

    job(work)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", "run_dir=here"])
    assert "ZeroDivisionError" in Path("here", LOG_FILE).read_text()


def test_an_interrupted_job_exits_as_shells_expect(job):
    def work(config):
        raise KeyboardInterrupt

    job(work)
    assert main(["evaluate"]) == 130


def test_a_run_dir_that_is_a_file_is_named(job, capsys):
    Path("taken").touch()
    job(start)
    assert main(["evaluate", "run_dir=taken"]) == 2
    assert "run_dir=taken cannot be written" in capsys.readouterr().err


def test_a_second_run_in_one_process_does_not_write_to_the_firsts_log(job):
    job(lambda config: start(config) and logging.getLogger("hasten.jobs.evaluate.run").info("once"))
    main(["evaluate", "run_dir=first"])
    main(["evaluate", "run_dir=second"])
    assert Path("first", LOG_FILE).read_text().count("once") == 1


def test_progress_without_a_terminal_is_plain_lines_with_the_time_left(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr("hasten.jobs.common.progress.time.monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "hasten.jobs.common.progress")
    with Progress("compress", 8, "block") as progress:
        progress.begin(2)
        for done, clock[0] in ((3, 1.0), (4, 20.0), (8, 21.0)):
            progress.update(done)
    # After 20 s 2 of the 6 blocks of this run are done: 4 more take 40 s. The first came too soon for a line.
    assert caplog.messages == ["compress: 4 of 8 blocks, 40 s left", "compress: 8 of 8 blocks"]


@pytest.fixture(autouse=True)
def without_handlers_afterwards():
    yield
    logs.log_to_terminal()
    logging.getLogger().removeHandler(logs._HANDLERS.pop())
