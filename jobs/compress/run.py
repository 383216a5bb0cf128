"""`hasten compress`: compresses a checkpoint and measures the loss of quality."""

from dataclasses import fields
from pathlib import Path
from time import perf_counter

from hasten.accel.compression.calibration.expert_tokens import expert_tokens
from hasten.accel.compression.calibration.group_sizes import described, layers_of_sizes
from hasten.accel.compression.calibration.layer_groups import group_sizes
from hasten.accel.compression.calibration.outer import OuterLevels, make_outer_levels
from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.outputs.gguf import GgufFolder
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.evaluation.sizes import disk_bytes, sizes
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.methods import build
from hasten.jobs.common.calibration import (
    calibration_settings,
    log_group_sizes,
    open_output,
    original,
    print_expert_tokens,
    run_pass,
    uses_auto,
)
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.gates import check_gates, compared_tasks, judge, print_gates
from hasten.jobs.common.gguf import gguf_options, level_of_bits, print_gguf
from hasten.jobs.common.loading import loader_of, print_loader
from hasten.jobs.common.plots import error_per_layer, seconds_per_block
from hasten.jobs.common.quality import FIGURES, measured, print_warnings, quality_warnings
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import FORMATS, plain
from hasten.jobs.common.target_group import block_division
from hasten.jobs.common.texts import Texts, print_texts
from hasten.jobs.compress.options import CompressConfig


def run(config: CompressConfig) -> Path:
    """Compress config.model into config.output; returns the path of report.json."""
    started = perf_counter()
    source = original(config.model)
    settings = make_settings(config, source)
    gates = check_gates(config.gate, config.evaluation.sequences)
    division = block_division(config.target_group, calibrates=True)
    texts = Texts(source, config.bos, config.template)
    tokens = texts.calibrate(config.calibration, settings.needs_tokens)
    windows = texts.evaluate(config.evaluation)
    compression = CalibrationPass(settings, tokens, config.workers, worker_resources(config), division)
    output = compression.task.output
    fingerprint = settings.fingerprint(compression.task.checkpoint, tokens)
    output.check(fingerprint, config.overwrite)
    log_group_sizes([settings.level], compression.task.layer_groups)
    cpus = config.workers * config.threads * config.target_group.size
    group = config.target_group
    with cluster_session(config, cpus, {"model": source}, {"output": output.path}, group=group):
        if config.overwrite or not output.finished:
            compression.check_weights()
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        with tracked(config, "compress", run_dir) as tracker:
            tracker.params(plain(config))
            open_output(output, fingerprint, config.overwrite, texts.origin)
            run_pass(compression, "compress", tracker)
            metrics = {} if windows is None else _evaluate(config, settings, windows, division)
            metrics |= compared_tasks(gates, [settings.output], source, settings.device)[0]
            report = _report(config, compression, metrics, perf_counter() - started) | texts.report(source)
            report["warnings"] = quality_warnings(report["metrics"], report["texts"])
            report["gates"] = judge(gates, report["metrics"], lambda: report["layers"])
            _figures(report, run_dir, tracker)
            tracker.metrics(report["metrics"])
            path = tracker.report(report)
    _print_summary(report)
    return path


def make_settings(config: CompressConfig, source: Path) -> Settings:
    """Settings of the calibration pass that compresses a checkpoint."""
    quantizer, column_quantizer, pruner = map(build, (config.quantizer, config.column_quantizer, config.pruner))
    gguf = gguf_options(config.format, config.gguf, config.head_bits, config.embedding_bits)
    level, suffix = _level(config)
    method = level.method_of([quantizer, column_quantizer, pruner])
    name = "-".join([source.name, *config.transforms, type(method).__name__.lower(), suffix])
    return calibration_settings(
        config,
        source,
        Path(config.output or Path("runs", "models", name)),
        quantizer=quantizer,
        column_quantizer=column_quantizer,
        pruner=pruner,
        level=level,
        outer=OuterLevels() if gguf else _outer_levels(config, level),
        gguf=gguf,
    )


def _level(config: CompressConfig) -> tuple[Level, str]:
    """The level of all layers, and what names of outputs say of it; UserError where options contradict each other."""
    if config.scheme is not None:
        defaults = {field.name: field.default for field in fields(CompressConfig)}
        for name in ("level", "bits", "group_size", "symmetric"):
            value = getattr(config, name)
            if value != defaults[name]:
                raise UserError(
                    f"scheme={config.scheme} and {name}={value} are given, which both say what layers become: give one "
                    "of them"
                )
        return parse_level(SCHEMES[config.scheme]), config.scheme
    if config.level is not None:
        level = parse_level(config.level)
        return level, level.name
    if config.format == FORMATS[1]:
        level = parse_level(level_of_bits(config.bits))
        return level, level.name
    suffix = f"w{config.bits}g{config.group_size}".replace("g-1", "")
    return GridLevel(Scheme(config.bits, config.group_size, config.symmetric)), suffix


def _outer_levels(config: CompressConfig, level: Level) -> OuterLevels:
    """Levels of output layer and embedding; their groups are by default those of the level of the other layers."""
    scheme = level.loader_scheme
    size = config.group_size if scheme is None or scheme.weights.kind != "int" else scheme.weights.group_size
    return make_outer_levels(
        [] if config.head_bits is None else [config.head_bits],
        [] if config.embedding_bits is None else [config.embedding_bits],
        size if config.head_group_size is None else config.head_group_size,
        size if config.embedding_group_size is None else config.embedding_group_size,
    )


def _evaluate(config: CompressConfig, settings: Settings, windows: Windows, division: Division | None) -> Record:
    needs, device = worker_resources(config), settings.device
    folders = settings.output, settings.checkpoint
    quality = measured(*folders, windows, config.workers, needs, device, division=division)
    return quality.sums.metrics() | {"evaluation_peak_rss_bytes": quality.peak_rss_bytes}


def _report(config: CompressConfig, compression: CalibrationPass, metrics: Record, seconds: float) -> Record:
    output, done = compression.task.output, compression.report
    assert isinstance(output, OutputFolder | GgufFolder)
    layers = [row for block in range(len(compression.task.layer_groups)) for row in output.facts(block)]
    stored = sizes(Checkpoint(output.path)).metrics()
    if not compression.task.settings.level.is_loaded_packed:
        # The checkpoint stores such a level in a larger, loadable form: report the packed size from the layers' facts.
        stored["bits_per_weight"] = sum(row["stored_bits"] for row in layers) / sum(row["weights"] for row in layers)
    level = compression.task.settings.level
    groups = layers_of_sizes(group_sizes(level, compression.task.layer_groups)) if uses_auto(level) else None
    return {
        "job": "compress",
        "config": plain(config),
        "metrics": {
            **dict.fromkeys(FIGURES),
            **metrics,
            **stored,
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
        "expert_tokens": expert_tokens(compression.task.layer_groups, layers, config.calibration.expert_tokens),
        "group_sizes": groups,
        "loader": loader_of(output.path),
        "types": output.type_bytes() if isinstance(output, GgufFolder) else None,
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
    print_loader(report["loader"], Path(report["output"]))
    if report["types"]:
        print_gguf(report["output"])
    if report["group_sizes"]:
        print(f"group sizes: {described(report['group_sizes'])}")
    if metrics["kl_divergence"] is not None:
        print(
            f"quality: perplexity {metrics['perplexity']:.3f}, was {metrics['perplexity_original']:.3f}; "
            f"KL divergence {metrics['kl_divergence']:.5f} nats a token; "
            f"same first token {metrics['top1_agreement']:.1%}"
        )
    print_expert_tokens(report)
    print_texts(report)
    print_warnings(report)
    print_gates(report)
    if report["fallbacks"]:
        print(f"see notes in the report of {len(report['fallbacks'])} layers, the first is {report['fallbacks'][0]}")
