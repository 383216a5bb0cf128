"""Folders of runs and sweeps, as the jobs leave them."""

import json
from pathlib import Path
from typing import Any

METHODS = {
    "gptq": "hasten.accel.compression.quantizers.gptq.GPTQ",
    "round_to_nearest": "hasten.accel.compression.quantizers.round_to_nearest.RoundToNearest",
}
QUALITY = {"perplexity": 12.5, "top1_agreement": 0.9}


def config(bits: int, quantizer: str, **more: Any) -> dict[str, Any]:
    damping = {"damping": 0.01} if quantizer == "gptq" else {}
    return {
        "run_dir": f"runs/{quantizer}-{bits}",
        "output": f"models/{quantizer}-{bits}",
        "tracking": {"uri": None, "name": f"{quantizer}-{bits}"},
        "model": "embedded:target",
        "bits": bits,
        "quantizer": {"_target_": METHODS[quantizer], **damping},
        "calibration": {"sequences": 16},
        **more,
    }


def layers(bits: float) -> list[dict[str, Any]]:
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    return [
        {"layer": f"model.layers.{block}.{kind}", "bits_per_weight": bits + block}
        for block in range(2)
        for kind in kinds
    ]


def compress(folder: Path, bits: int, quantizer: str, divergence: float | None, size: int, **more: Any) -> Path:
    """A finished run of `hasten compress`."""
    metrics = {"kl_divergence": divergence, **QUALITY, "bytes": size, "seconds": 2.0, "calibration_seconds": 0.5}
    report = {
        "job": "compress",
        "config": config(bits, quantizer),
        "metrics": metrics,
        "layers": layers(bits),
        "output": str(folder / "model"),
    }
    return write(folder, report | more)


def decode(folder: Path, target: str, drafter: str, speed: float) -> Path:
    """A finished run of `hasten decode`."""
    metrics = {"tokens_per_second": speed, "draft_share": 0.25, "target_share": 0.7, "verify_share": 0.05}
    report = {
        "job": "decode",
        "config": {"target": target, "drafter": {"_target_": f"hasten.accel.decoding.drafters.{drafter}.Drafter"}},
        "metrics": {**metrics, "mean_acceptance_length": 1.5, "seconds": 3.0},
        "acceptance_per_position": [0.5, 0.25],
        "output": "completions.jsonl",
    }
    return write(folder, report)


def search(folder: Path) -> Path:
    """A finished run of `hasten search` of two budgets."""
    answers = [{"budget": budget, "kl_divergence": 1 / budget**3, "bytes": int(1000 * budget)} for budget in (2.5, 3.0)]
    report = {
        "job": "search",
        "config": {
            "budget": [2.5, 3.0],
            "allocator": {"_target_": "hasten.accel.compression.search.evopress.EvoPress"},
        },
        "metrics": {**answers[0], "seconds": 9.0},
        "layers": [row | {"budget": each["budget"]} for each in answers for row in layers(each["budget"])],
        "budgets": answers,
        "pareto": [
            {"allocator": name, "budget": each["budget"], "bits_per_weight": each["budget"], "bytes": 100}
            | {"kl_divergence": each["kl_divergence"]}
            for name in ("uniform", "evopress")
            for each in answers
        ],
        "output": str(folder / "model"),
    }
    return write(folder, report)


def failed(folder: Path, message: str) -> Path:
    """A run that ended with an error: a log, and no report."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "bits: 5\nquantizer:\n  _target_: hasten.accel.compression.quantizers.gptq.GPTQ\n"
    )
    (folder / "hasten.log").write_text(
        "2026-11-21 13:00:00,001 INFO hasten.jobs.common.run: starting\n"
        "2026-11-21 13:00:01,002 ERROR hasten.traceback: the run failed\n"
        'Traceback (most recent call last):\n  File "x.py", line 1, in run\n    raise Lost("x")\n'
        f"hasten.accel.errors.Lost: {message}\n"
    )
    return folder


def sweep(folder: Path, ended: bool = True, **replaced: Any) -> Path:
    """A sweep of compress over bits and quantizer with two objectives: four points finished and one failed.

    replaced: keys of points by their name. One that has not ended has another two points, running and waiting.
    """
    points = []
    small, large = 2 * 2**20, 4 * 2**20
    figures = {(2, "gptq"): (0.8, small), (2, "round_to_nearest"): (1.6, small)}
    figures |= {(4, "gptq"): (0.05, large), (4, "round_to_nearest"): (0.1, large)}
    for (bits, quantizer), (divergence, size) in figures.items():
        name = f"{quantizer}-{bits}"
        run = compress(folder / "points" / name, bits, quantizer, divergence, size)
        metrics = json.loads((run / "report.json").read_text())["metrics"]
        points.append(_point(name, bits, quantizer, "finished") | {"seconds": 2.0, "metrics": metrics})
    error = {"type": "ActorDiedError", "message": "out of memory"}
    points.append(_point("gptq-8", 8, "gptq", "failed") | {"seconds": 1.0, "error": error})
    if not ended:
        points += [_point("a-8", 8, "gptq", "running"), _point("b-8", 8, "gptq", "waiting")]
    for row in points:
        row |= replaced.get(row["name"], {})
        place = folder / row["folder"]
        place.mkdir(parents=True, exist_ok=True)
        (place / "point.json").write_text(json.dumps(row))
    head = {
        "job": "sweep",
        "sweep_of": "compress",
        "config": {"bits": "2,4,8"},
        "varied": ["bits", "quantizer"],
        "objectives": [
            {"metric": "kl_divergence", "direction": "minimize"},
            {"metric": "bytes", "direction": "minimize"},
        ],
    }
    (folder / "sweep.json").write_text(json.dumps(head))
    if ended:
        write(folder, head | {"metrics": {"points": 5}, "layers": [], "output": None, "points": points})
    return folder


def write(folder: Path, report: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def _point(name: str, bits: int, quantizer: str, status: str) -> dict[str, Any]:
    values = {"bits": bits, "quantizer": quantizer}
    row = {"name": name, "folder": f"points/{name}", "values": values, "status": status}
    return row | {"seconds": None, "metrics": {}, "error": None}
