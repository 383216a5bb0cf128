"""`hasten compress`: a checkpoint in, a smaller one out, with what it cost in quality."""

from pathlib import Path
from time import perf_counter

from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.evaluation.sizes import disk_bytes, sizes
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.compose import plain
from hasten.jobs.cli.methods import build
from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.common.calibration import calibration_settings, calibration_tokens, open_output, original, run_pass
from hasten.jobs.common.cluster import joined
from hasten.jobs.common.plots import error_per_layer, seconds_per_block
from hasten.jobs.common.quality import FIGURES, held_out_windows, measured
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.tokenizer import load_tokenizer
from hasten.jobs.compress.options import CompressConfig


def run(config: CompressConfig) -> Path:
    """Compress config.model into config.output; returns the path of report.json."""
    started = perf_counter()
    source = original(config.model)
    settings = make_settings(config, source)
    tokenizer = load_tokenizer(source)
    tokens = calibration_tokens(config.calibration, settings, tokenizer)
    windows = held_out_windows(config.evaluation, tokenizer, source)
    compression = CalibrationPass(settings, tokens, config.workers, gpus_per_worker(config.device))
    output = compression.task.output
    fingerprint = settings.fingerprint(compression.task.checkpoint, tokens)
    output.check(fingerprint, config.overwrite)
    cpus = config.workers * config.threads
    with joined(config, cpus, {"model": source}, {"output": output.path}):
        if config.overwrite or not output.finished:
            compression.check_weights()
        # Nothing was written so far: what is wrong in the input leaves nothing behind.
        run_dir = start(config)
        with tracked(config, "compress", run_dir) as tracker:
            tracker.params(plain(config))
            open_output(output, fingerprint, config.overwrite)
            run_pass(compression, "compress", tracker)
            metrics = {} if windows is None else _evaluate(config, settings, windows)
            report = _report(config, compression, metrics, perf_counter() - started)
            _figures(report, run_dir, tracker)
            tracker.metrics(report["metrics"])
            path = tracker.report(report)
    _print_summary(report)
    return path


def make_settings(config: CompressConfig, source: Path) -> Settings:
    """Settings of the calibration pass that compresses a checkpoint."""
    quantizer = build(config.quantizer)
    name = f"{source.name}-{type(quantizer).__name__.lower()}-w{config.bits}g{config.group_size}".replace("g-1", "")
    return calibration_settings(
        config,
        source,
        Path(config.output or Path("runs", "models", name)),
        quantizer=quantizer,
        scheme=Scheme(config.bits, config.group_size, config.symmetric),
    )


def _evaluate(config: CompressConfig, settings: Settings, windows: Windows) -> Record:
    found = measured(settings.output, settings.checkpoint, windows, config.workers, config.threads, settings.device)
    return found.sums.metrics() | {"evaluation_peak_rss_bytes": found.peak_rss_bytes}


def _report(config: CompressConfig, compression: CalibrationPass, metrics: Record, seconds: float) -> Record:
    output, done = compression.task.output, compression.report
    assert isinstance(output, OutputFolder)
    layers = [row for block in range(compression.task.architecture.num_blocks) for row in output.facts(block)]
    return {
        "job": "compress",
        "config": plain(config),
        "metrics": {
            **dict.fromkeys(FIGURES),
            **metrics,
            **sizes(Checkpoint(output.path)).metrics(),
            "bytes_original": disk_bytes(compression.task.checkpoint.path),
            "seconds": seconds,
            "calibration_seconds": done.seconds,
            "cpu_seconds": done.cpu_seconds,
            "peak_rss_bytes": max(done.peak_rss_bytes, metrics.get("evaluation_peak_rss_bytes", 0)),
            "blocks_resumed": done.resumed,
            "calibrator_restarts": done.restarts,
        },
        "layers": layers,
        "blocks": done.blocks,
        "fallbacks": [row["layer"] for row in layers if row["notes"]],
        "output": str(output.path),
    }


def _figures(report: Record, run_dir: Path, tracker: Tracker) -> None:
    tracker.figure(error_per_layer(report["layers"], run_dir / "error_per_layer.png"))
    if report["blocks"]:
        rows = [{"layer": str(row["block"]), "seconds": row["seconds"]} for row in report["blocks"]]
        tracker.figure(seconds_per_block(rows, run_dir / "seconds_per_block.png"))


def _print_summary(report: Record) -> None:
    metrics = report["metrics"]
    print(f"checkpoint: {as_given(report['output'])}")
    print(
        f"size: {metrics['bytes'] / 2**20:.1f} MiB, was {metrics['bytes_original'] / 2**20:.1f} MiB; "
        f"{metrics['bits_per_weight']:.3f} bits per quantized weight"
    )
    if metrics["kl_divergence"] is not None:
        print(
            f"quality: perplexity {metrics['perplexity']:.3f}, was {metrics['perplexity_original']:.3f}; "
            f"KL divergence {metrics['kl_divergence']:.5f} nats a token; "
            f"same first token {metrics['top1_agreement']:.1%}"
        )
    if report["fallbacks"]:
        print(f"see notes in the report of {len(report['fallbacks'])} layers, the first is {report['fallbacks'][0]}")
