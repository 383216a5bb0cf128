"""The texts that runs read, and their warnings, in the page and in the terminal."""

import contextlib
import io
from pathlib import Path

from hasten.jobs.cli.main import main
from tests.jobs.reports import folders


def test_texts_and_warnings_are_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    text = {"source": "/texts/<b>.txt", "tokens": 2048, "begin_text": "<bos>", "is_own_text": False}
    own = {"source": "library", "tokens": 62, "begin_text": "", "is_own_text": True}
    texts = {"calibration": text, "search": None, "evaluation": own}
    warning = "the original's perplexity of 4096.0 is that of guessing"
    runs = [
        folders.compress(tmp_path / str(bits), bits, "gptq", 0.1 / bits, 1000 * bits, texts=texts, warnings=warnings)
        for bits, warnings in ((3, []), (4, [warning]))
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["report", *map(str, runs)]) == 0
    lines = printed.getvalue().splitlines()
    assert "calibration on 2048 tokens of /texts/<b>.txt, windows begin with <bos>" in lines
    assert "evaluation on 62 tokens of library, hasten's own on a model that is not embedded" in lines
    assert sum(line.endswith(f": {warning}") for line in lines) == 1
    page = Path(lines[-1].removeprefix("report: ")).read_text(encoding="utf-8")
    assert "calibration on 2048 tokens of /texts/&lt;b&gt;.txt, windows begin with &lt;bos&gt;." in page
    assert "is that of guessing." in page
