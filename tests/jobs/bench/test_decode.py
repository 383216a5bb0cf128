"""`hasten bench decode`, small: its tables, and that every way to decode gives generate's tokens."""

import json

from hasten.jobs.bench import decode
from hasten.jobs.common.schema import Tracking


def test_tables_of_the_embedded_models(tmp_path):
    config = decode.Config(
        count=2,
        max_new_tokens=12,
        drafters=["draft_model", "prompt_lookup"],
        max_draft_tokens=4,
        in_flight=2,
        shared=False,
        document=str(tmp_path / "benchmarks.md"),
        run_dir=str(tmp_path / "run"),
        tracking=Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )
    report = json.loads(decode.run(config).read_text())
    metrics = report["metrics"]
    ways = ("transformers_generate", "transformers_assisted", "hasten_plain", "draft_model", "prompt_lookup")
    assert [metrics[f"library.{way}.same"] for way in ways] == [2.0] * len(ways)
    assert {"in_flight.plain", "in_flight.prompt_lookup", "learning.aded"} <= metrics.keys()
    # What is drafted cannot make a pass give less than its own token, or more than the budget and one.
    lengths = [value for name, value in metrics.items() if name.startswith("sampled.")]
    assert len(lengths) == 6
    assert all(1 <= length <= 9 for length in lengths)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## decode: speculative decoding against transformers" in text
    assert "| prompt_lookup |" in text
