"""The page, its charts and the tables in the terminal, from the command."""

import base64
import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hasten.jobs.cli.main import main
from hasten.jobs.report.pictures import Pictures
from tests.jobs.reports import folders

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>alert(1)</script> & \"quoted\" 'too' $x_ [bold]"


class Page(HTMLParser):
    """Tags with their attributes, and the texts of cells and of everything."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text = [], [], ""
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cells.append(" ".join(self._cell.split()))
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def run(*words):
    """What `hasten report WORDS` printed, and the path of the page that it wrote."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["report", *map(str, words)]) == 0
    last = printed.getvalue().splitlines()[-1]
    assert last.startswith("report: ")
    return printed.getvalue(), Path(last.removeprefix("report: "))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """What was printed for a sweep that has not ended, and its page; the sweep's folder is called sweep."""
    return run(folders.sweep(tmp_path_factory.mktemp("swept") / "sweep", ended=False))


def test_a_sweep_is_reported_into_its_own_folder_with_all_charts_that_have_data(swept):
    out, path = swept
    assert path.parts[-3:] == ("sweep", "report", "report.html")
    pictures = sorted(each for each in path.parent.iterdir() if each.suffix == ".png")
    assert [each.stem for each in pictures] == [
        *("bits_per_layer", "bits_per_layer_2", "quality_against_size", "time_share")
    ]
    assert all(each.read_bytes()[:8] == PNG for each in pictures)
    text = Page(path.read_text()).text
    assert "Sweep of compress: bits × quantizer" in text
    for told in (
        "bits=4 quantizer=gptq won by KL divergence: 0.05000 nats a token",
        "compress, 7 points: 4 finished, 1 running, 1 waiting, 1 failed",
        "Left out for lack of data: quality against tokens per second, acceptance by depth.",
    ):
        assert told in out
        assert told in text


def test_the_page_needs_nothing_but_itself(swept):
    text = swept[1].read_text()
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert len(page.all("img")) == 4
    links = [value for _, each in page.tags for key, value in each.items() if key in ("src", "srcset", "href")]
    assert all(link.startswith("data:") for link in links)
    assert not any(tag in ("iframe", "object", "embed", "base") for tag, _ in page.tags)
    assert re.findall(r"@import|url\(", text) == []
    svg = base64.b64decode(page.all("img")[0]["src"].partition("base64,")[2])
    assert re.findall(rb'href="(?!#|data:)', svg) == []


def test_texts_of_runs_are_escaped_wherever_they_are_shown(folder):
    values = {"bits": EVIL, "quantizer": EVIL}
    error = {"type": EVIL, "message": EVIL}
    evil = {"gptq-4": {"values": values, "name": EVIL}, "gptq-8": {"values": values, "error": error}}
    folders.sweep(folder / "sweep", **evil)
    report = folder / "sweep/points/gptq-4/report.json"
    found = json.loads(report.read_text())
    found["layers"][0]["layer"] = f"model.layers.0.{EVIL}"
    report.write_text(json.dumps(found))
    out, path = run(folder / "sweep")
    text = path.read_text()
    assert "<script>alert" not in text
    assert len(Page(text).all("script")) == 1
    # Read back they are what they were: two settings of two rows, a name, and the type and message of the failure.
    assert Page(text).cells.count(EVIL) == 7
    assert EVIL in out


def test_only_the_script_of_the_page_itself_may_run(swept):
    (policy,) = [each["content"] for each in Page(swept[1].read_text()).all("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; ")
    assert re.search(r"script-src 'sha256-[\w+/=]+'$", policy)


def test_tables_have_headings_and_pictures_have_texts(swept):
    page = Page(swept[1].read_text())
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("table")) == len(page.all("caption")) == 2
    # Eleven of the points and five of the failures; each row of the points has its name as heading.
    assert [each["scope"] for each in page.all("th")] == [*["col"] * 11, *["row"] * 7, *["col"] * 5]
    assert [each["aria-sort"] for each in page.all("th") if "aria-sort" in each] == ["ascending"]
    alts = [each["alt"] for each in page.all("img")]
    assert alts[0] == (
        "KL divergence against size of 4 finished rows. On the Pareto front: bits=2 quantizer=gptq: "
        "0.8000 nats a token, 2 MiB; bits=4 quantizer=gptq: 0.05000 nats a token, 4 MiB."
    )
    assert all(len(alt) > 40 for alt in alts)


def test_a_failure_is_told_with_type_message_and_folder_of_the_log(swept):
    out, path = swept
    place = path.parents[1] / "points/gptq-8"
    row = ["7", "bits=8 quantizer=gptq", "ActorDiedError", "out of memory", str(place)]
    assert Page(path.read_text()).cells[-5:] == row
    (line,) = [line for line in out.splitlines() if "ActorDiedError" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == row


def test_the_terminal_has_the_tables_of_the_page(swept):
    out, path = swept
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    told = [cell for line in lines if not set("".join(line)) <= {"-"} for cell in line]
    # In the page the unit stands on a line of its own below the title.
    shown = [cell.replace(" nats", ", nats").replace(" MiB", ", MiB") for cell in Page(path.read_text()).cells]
    shown = [", ".join(cell.split(" ")) if cell in ("time s", "winner front") else cell for cell in shown]
    assert told == [cell.replace("token %", "token, %") for cell in shown]


def test_a_narrow_terminal_gets_the_first_columns_and_is_told_of_the_others(folder, monkeypatch, capsys):
    from hasten.jobs.report.comparison import compare
    from hasten.jobs.report.reading import read
    from hasten.jobs.report.terminal import show

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show(compare(read([folders.sweep(folder / "sweep")])), "")
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    (head,) = [line for line in lines if line.startswith("| #") and "bits" in line]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["#", "mark", "bits", "quantizer", "status"]
    assert max(len(line) for line in lines if line.startswith("|")) <= 60
    assert any(line.startswith("The terminal is too narrow for: KL divergence, nats a token") for line in lines)


def test_runs_of_several_jobs_share_a_page(folder, monkeypatch):
    # Looked at in test_browser.py; drawn here, they would take most of the time.
    monkeypatch.setattr("hasten.jobs.report.page.pictures", lambda chart: Pictures(chart, *["data:,"] * 4))
    compressed = folders.compress(folder / "a", 3, "gptq", 0.2, 300)
    better = folders.compress(folder / "b", 4, "gptq", 0.1, 400)
    decoded = [
        folders.decode(folder / name, str(source / "model"), "union", speed)
        for name, source, speed in (("c", compressed, 90.0), ("d", better, 60.0))
    ]
    out, path = run(compressed, better, *decoded, folders.search(folder / "e"))
    assert re.fullmatch(r"runs/reports/[\d_-]+/report\.html", str(path))
    assert {each.stem for each in path.parent.iterdir()} == {
        *("quality_against_size", "quality_against_speed", "acceptance_by_depth", "time_share", "allocators_6"),
        *("bits_per_layer", "bits_per_layer_2", "bits_per_layer_3", "report"),
    }
    assert "Left out" not in out
    assert "compress, decode and search compared" in Page(path.read_text()).text


def test_a_report_written_again_has_no_charts_of_the_one_before(folder):
    folders.write(folder / "run", {"job": "levels", "metrics": {"bytes": 5, "seconds": 1.0}})
    (folder / "run/report").mkdir()
    for name in ("quality_against_size.png", "bits_per_layer_3.png", "mine.png"):
        (folder / "run/report" / name).touch()
    _, path = run(folder / "run")
    assert path == folder / "run/report/report.html"
    assert sorted(each.name for each in path.parent.iterdir()) == ["mine.png", "report.html"]


def test_output_is_where_the_report_goes(folder):
    run_folder = folders.write(folder / "run", {"job": "levels", "metrics": {"bytes": 5}})
    assert run(run_folder, "--output", "there")[1] == Path("there/report.html")
    assert not (folder / "run/report").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: RUN|SWEEP"),
        (["run", "--colour"], "unrecognized arguments: --colour"),
        (["elsewhere"], "elsewhere does not exist: expected the folder of a run or of a sweep, or its report.json"),
        (["run", "--output", "run/report.json"], "--output run/report.json cannot be written: "),
    ],
)
def test_a_wrong_argument_is_one_line(folder, capsys, words, told):
    folders.compress(folder / "run", 3, "gptq", 0.2, 300)
    assert main(["report", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hasten: error: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err
