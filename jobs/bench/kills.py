"""SIGKILL of drivers and calibrators at random moments: the resumed runs must write the same bytes.

A killed driver is restarted with the same command; a killed calibrator is replaced by its driver. Every finished run is
compared with an undisturbed one, and runs follow each other until all kills are delivered.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import digest, hasten_compress
from hasten.jobs.cli.quotes import word
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "kills: SIGKILL at random moments"
_DRIVER, _CALIBRATOR = "driver", "calibrator"


@dataclass
class Config(Run):
    """Kill compressions and check that they resume with the same bytes."""

    model: str = option("embedded:target", f"what is compressed: {MODEL}")
    kills: int = option(20, "SIGKILLs to deliver", at_least=1)
    sequences: int = option(32, "calibration sequences of the library", at_least=2)
    bits: int = option(4, "bits of a quantized weight", at_least=2, at_most=8)
    workers: int = option(2, "calibrators", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    folder = start(config)
    options = {
        "model": config.model,
        "bits": config.bits,
        "workers": config.workers,
        "calibration.sequences": config.sequences,
    }
    with tracked(config, "bench kills", folder) as tracker:
        tracker.params(plain(config))
        started = time.monotonic()
        undisturbed = hasten_compress(folder / "calm", options)
        delivered: Counter[str] = Counter()
        digests: list[str] = []
        generator = random.Random(config.seed)
        while sum(delivered.values()) < config.kills:
            place = folder / f"run-{len(digests)}"
            _disturbed(place, options, undisturbed.whole_seconds, config.kills, delivered, generator)
            digests.append(digest(place / "model"))
            _LOG.info("%d of %d kills delivered, %d runs ended", sum(delivered.values()), config.kills, len(digests))
        same = sum(value == undisturbed.digest for value in digests)
        publish(config.document, folder, HEADING, _section(config, delivered, len(digests), same))
        report = {
            "job": "bench kills",
            "config": plain(config),
            "metrics": {
                "kills": sum(delivered.values()),
                "kills_of_drivers": delivered[_DRIVER],
                "kills_of_calibrators": delivered[_CALIBRATOR],
                "runs": len(digests),
                "runs_with_the_same_bytes": same,
                "seconds": time.monotonic() - started,
            },
            "output": str(folder),
        }
        return tracker.report(report)


def _disturbed(
    place: Path,
    options: Mapping[str, object],
    seconds: float,
    kills: int,
    delivered: Counter[str],
    generator: random.Random,
) -> None:
    """Run to the end, restarting after each kill of the driver; kills: to deliver in total, over all runs."""
    place.mkdir(parents=True)
    words = {
        **options,
        "output": place / "model",
        "tracking.uri": f"sqlite:///{place.resolve() / 'mlflow.db'}",
        "evaluation.sequences": 0,
    }
    command = [sys.executable, "-P", "-m", "hasten", "compress", *(word(key, value) for key, value in words.items())]
    while True:
        with (place / "output.log").open("ab") as log:
            driver = subprocess.Popen(
                [*command, f"run_dir={place / f'run-{time.time_ns()}'}"],
                stdout=log,
                stderr=log,
                env=os.environ | {"RAY_ADDRESS": ""},
            )
            while sum(delivered.values()) < kills:
                try:
                    driver.wait(generator.uniform(0, seconds))
                    break
                except subprocess.TimeoutExpired:
                    _kill(driver, generator.choice((_DRIVER, _CALIBRATOR)), delivered, generator)
            status = driver.wait()
        if status == 0:
            return
        if status != -signal.SIGKILL:
            raise RuntimeError(f"a run ended with status {status}: see {place / 'output.log'}")


def _kill(driver: subprocess.Popen[bytes], kind: str, delivered: Counter[str], generator: random.Random) -> None:
    if kind == _DRIVER:
        driver.kill()
        driver.wait()
        delivered[kind] += 1
        return
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
        calibrators = [child for child in children if "Calibrator" in " ".join(child.cmdline()[:1])]
        if calibrators:
            generator.choice(calibrators).kill()
            delivered[kind] += 1
    except psutil.NoSuchProcess:
        return


def _section(config: Config, delivered: Counter[str], runs: int, same: int) -> str:
    row = [str(delivered[_DRIVER]), str(delivered[_CALIBRATOR]), str(runs), str(same)]
    return "\n\n".join(
        [
            f"GPTQ W{config.bits} of {config.model}, {config.sequences} calibration sequences, "
            f"workers={config.workers}. The bytes are compared with those of an undisturbed run.",
            provenance(),
            table(["drivers killed", "calibrators killed", "runs", "with the same bytes"], [row]),
        ]
    )
