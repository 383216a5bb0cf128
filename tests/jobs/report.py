"""What users script against in report.json, and the report of a run."""

import json
from pathlib import Path

METRICS = {
    "perplexity",
    "perplexity_original",
    "kl_divergence",
    "top1_agreement",
    "bits_per_weight",
    "bytes",
    "seconds",
    "cpu_seconds",
    "peak_rss_bytes",
}


def last_report(capsys):
    """What the run printed last names: the report, and the folder that it is in."""
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("report: ")
    path = Path(line.removeprefix("report: "))
    report = json.loads(path.read_text())
    assert path.is_relative_to(f"runs/{report['job']}")
    return report, path.parent
