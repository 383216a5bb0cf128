"""SIGKILL of drivers and calibrators at random moments: the resumed runs must write the same bytes.

A killed driver is restarted with the same command; a killed calibrator is replaced by its driver. Every finished run is
compared with an undisturbed one of the same options, and runs of all variants follow each other in turn until all kills
are delivered.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from hasten.accel.errors import UserError
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
    variants: list[str] = option(
        [""],
        "further options of hasten compress, KEY=VALUE with blanks between them; the items take turns",
    )
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass
class Disturbed:
    """Runs of one variant. delivered: kills by kind of process. same: runs that wrote an undisturbed run's bytes."""

    variant: str
    delivered: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    same: int = 0

    @property
    def kills(self) -> int:
        """Kills of all processes."""
        return sum(self.delivered.values())


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    folder = start(config)
    variants = [_options(config, text) for text in config.variants or [""]]
    with tracked(config, "bench kills", folder) as tracker:
        tracker.params(plain(config))
        started = time.monotonic()
        undisturbed = [hasten_compress(folder / f"calm-{number}", options) for number, options in enumerate(variants)]
        results = [Disturbed(text) for text in config.variants or [""]]
        generator = random.Random(config.seed)
        runs = 0
        while sum(result.kills for result in results) < config.kills:
            number, place = runs % len(variants), folder / f"run-{runs}"
            result, calm = results[number], undisturbed[number]
            # Each kind of run gets its share of the kills, and the last one what is left.
            left = config.kills - sum(other.kills for other in results)
            share = min(left, -(-config.kills // len(variants)))
            _disturbed(place, variants[number], calm.whole_seconds, result.kills + share, result.delivered, generator)
            result.runs += 1
            result.same += digest(place / "model") == calm.digest
            runs += 1
            _LOG.info("%d of %d kills delivered, %d runs ended", config.kills - left, config.kills, runs)
        publish(config.document, folder, HEADING, _section(config, results))
        delivered = sum((result.delivered for result in results), Counter[str]())
        report = {
            "job": "bench kills",
            "config": plain(config),
            "metrics": {
                "kills": sum(delivered.values()),
                "kills_of_drivers": delivered[_DRIVER],
                "kills_of_calibrators": delivered[_CALIBRATOR],
                "runs": runs,
                "runs_with_the_same_bytes": sum(result.same for result in results),
                "seconds": time.monotonic() - started,
            },
            "output": str(folder),
        }
        return tracker.report(report)


def _options(config: Config, variant: str) -> dict[str, object]:
    """Options of `hasten compress` of a variant; UserError where it has a word without `=`."""
    wrong = next((item for item in variant.split() if "=" not in item), None)
    if wrong is not None:
        raise UserError(f"variants has {wrong!r}: expected KEY=VALUE with blanks between them")
    pairs = (item.partition("=") for item in variant.split())
    given: dict[str, object] = {key: value for key, _, value in pairs}
    # A scheme or level says its own bits.
    bits = {} if {"scheme", "level", "bits"} & given.keys() else {"bits": config.bits}
    shared = {"model": config.model, "workers": config.workers, "calibration.sequences": config.sequences}
    return {**shared, **bits, **given}


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


def _section(config: Config, results: Sequence[Disturbed]) -> str:
    rows = [
        [
            result.variant or "–",
            str(result.delivered[_DRIVER]),
            str(result.delivered[_CALIBRATOR]),
            str(result.runs),
            str(result.same),
        ]
        for result in results
    ]
    return "\n\n".join(
        [
            f"GPTQ of {config.model}, W{config.bits} where the options say nothing else, {config.sequences} "
            f"calibration sequences, workers={config.workers}. Bytes are compared with those of an undisturbed run.",
            provenance(),
            table(["options", "drivers killed", "calibrators killed", "runs", "with the same bytes"], rows),
        ]
    )
