"""What hasten and its peers measure KV caches on: one file of token ids."""

import json
from pathlib import Path

from hasten.cluster.programs.caches import CacheInputs


def write_inputs(inputs: CacheInputs, path: Path) -> Path:
    """Write windows and recall samples for peers/kv_caches.py; returns the path."""
    recall = {
        task: [
            {"context": sample.context, "turns": [(turn.question, turn.answer) for turn in sample.turns]}
            for sample in samples
        ]
        for task, samples in inputs.recall.items()
    }
    assert inputs.windows is not None
    path.write_text(json.dumps({"context": inputs.context, "windows": inputs.windows.tolist(), "recall": recall}))
    return path
