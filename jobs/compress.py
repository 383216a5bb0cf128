"""`hasten compress`: a checkpoint in, a smaller one out, with what it cost in quality."""

from pathlib import Path
from time import perf_counter
from typing import Any

from jobs.schema import CompressConfig


def run(config: CompressConfig) -> Path:
    """Compress config.model into config.output; returns the path of report.json."""
    from accel.evaluation.perplexity import load_windows
    from accel.models.checkpoint import Checkpoint, resolve
    from accel.models.families import family_of
    from cluster.calibration_pass import CalibrationPass
    from cluster.session import session
    from jobs.calibration import calibration_tokens, run_pass
    from jobs.compose import plain
    from jobs.run import start
    from jobs.tokenizer import load_tokenizer, vocabulary_size

    started = perf_counter()
    # Absolute, as the workers of a cluster have other current folders.
    source = resolve(config.model).absolute()
    # Before transformers reads the folder, whose errors are no single lines.
    family_of(Checkpoint(source).config.get("model_type"))
    settings = _settings(config, source)
    tokenizer = load_tokenizer(source)
    tokens = calibration_tokens(config.calibration, settings.quantizer, tokenizer, source)
    evaluation = config.evaluation
    cut = None
    if evaluation.sequences:
        cut = load_windows(
            evaluation.source,
            tokenizer,
            evaluation.sequences,
            evaluation.sequence_length,
            evaluation.stride,
            vocabulary=vocabulary_size(source),
        )
    gpus = 1 if settings.device == "cuda" else 0
    compression = CalibrationPass(settings, tokens, config.workers, gpus)
    output = compression.task.output
    fingerprint = settings.fingerprint(compression.task.checkpoint, tokens)
    output.check(fingerprint, config.overwrite)
    with session(config.address, config.workers * config.threads):
        if config.overwrite or not output.finished:
            compression.check_weights()
        # Nothing was written so far: what is wrong in the input leaves nothing behind.
        run_dir = start(config)
        with _tracker(config, run_dir) as tracker:
            output.open(fingerprint, config.overwrite)
            tracker.params(plain(config))
            run_pass(compression, "compress", tracker)
            metrics: dict[str, Any] = {}
            if cut is not None:
                metrics = _evaluate(config, settings, source, cut, gpus)
            report = _report(config, compression, metrics, perf_counter() - started)
            _figures(report, run_dir, tracker)
            tracker.metrics(report["metrics"])
            path = tracker.report(report)
    _print_summary(report)
    return path


def _settings(config: CompressConfig, source: Path) -> Any:
    from accel.compression.formats.pack_quantized import PackQuantized
    from accel.compression.quantizers.base import Scheme
    from accel.compression.settings import Settings
    from jobs.arithmetic import resolve_device, resolve_dtype
    from jobs.methods import build

    device = resolve_device(config.device)
    quantizer = build(config.quantizer)
    name = f"{source.name}-{type(quantizer).__name__.lower()}-w{config.bits}g{config.group_size}".replace("g-1", "")
    return Settings(
        checkpoint=source,
        output=Path(config.output or Path("runs", "models", name)).expanduser().absolute(),
        quantizer=quantizer,
        scheme=Scheme(config.bits, config.group_size, config.symmetric),
        format=PackQuantized(),
        ignore=tuple(config.ignore),
        skip_first=config.skip_first,
        skip_last=config.skip_last,
        propagate=config.propagate,
        dtype=resolve_dtype(config.dtype, device),
        device=device,
        threads=config.threads,
        batch=config.calibration.batch,
        shards=config.calibration.shards,
        expert_tokens=config.calibration.expert_tokens,
    )


def _tracker(config: CompressConfig, run_dir: Path) -> Any:
    from cluster.tracking import Tracker

    return Tracker(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.name or f"compress-{run_dir.name}",
        run_dir,
    )


def _evaluate(config: CompressConfig, settings: Any, source: Path, cut: Any, gpus: float) -> dict[str, Any]:
    from cluster.evaluation import measure
    from jobs.progress import Progress

    with Progress("evaluate", min(config.workers, len(cut)), "part") as progress:
        measured = measure(
            settings.output,
            source,
            cut,
            config.workers,
            config.threads,
            device=settings.device,
            gpus=gpus,
            progress=lambda done, total: progress.update(done),
        )
    return measured.sums.metrics() | {"evaluation_peak_rss_bytes": measured.peak_rss_bytes}


def _report(config: CompressConfig, compression: Any, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    from accel.evaluation.sizes import disk_bytes, sizes
    from accel.models.checkpoint import Checkpoint
    from jobs.compose import plain

    output, done = compression.task.output, compression.report
    layers = [row for block in range(compression.task.architecture.num_blocks) for row in output.facts(block)]
    nothing = dict.fromkeys(("perplexity", "perplexity_original", "kl_divergence", "top1_agreement"))
    return {
        "job": "compress",
        "config": plain(config),
        "metrics": {
            **nothing,
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


def _figures(report: dict[str, Any], run_dir: Path, tracker: Any) -> None:
    from cluster.figures import error_per_layer, seconds_per_block

    tracker.figure(error_per_layer(report["layers"], run_dir / "error_per_layer.png"))
    if report["blocks"]:
        rows = [{"layer": str(row["block"]), "seconds": row["seconds"]} for row in report["blocks"]]
        tracker.figure(seconds_per_block(rows, run_dir / "seconds_per_block.png"))


def _print_summary(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    print(f"checkpoint: {report['output']}")
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
