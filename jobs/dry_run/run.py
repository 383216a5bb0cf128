"""Dry runs: memory, traffic, files and time of a job, on this machine or on a described cluster."""

import dataclasses
import json
import shutil
from pathlib import Path
from time import perf_counter

import psutil
import torch

from hasten.accel.costs.estimate import Estimate, Rates, Step
from hasten.accel.costs.placement import Node, Placed, Placement, place
from hasten.accel.errors import UserError
from hasten.cluster.runtime import rates as measured
from hasten.cluster.runtime.resources import usable_cores
from hasten.jobs.cli.compose import compose
from hasten.jobs.common.logs import default_folder
from hasten.jobs.common.markdown import table
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Run, plain
from hasten.jobs.dry_run import estimates
from hasten.jobs.dry_run.advice import Changes, advise
from hasten.jobs.dry_run.options import PlanConfig, parse_words, size_of
from hasten.jobs.dry_run.planned import planned_job
from hasten.jobs.dry_run.setting import Setting, Shapes

_GPU_MEMORY = 80 * 10**9
# Share of a node's memory that Ray gives its object store; Ray spills the rest to disk.
_STORE_SHARE = 0.3
_RESOURCES = {"memory": "memory", "gpu_memory": "a GPU's memory", "cpus": "processors", "gpus": "GPUs"}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan: the estimate, the placement of its processes, and options that would make it fit.

    lacking: sentences on the processes and files that fit nowhere. advice: sets of (option, value) pairs that make the
    job fit, the fastest first. processors: number that compute, over all nodes.
    """

    estimate: Estimate
    placement: Placement
    rates: Rates
    lacking: list[str]
    advice: list[Changes]
    processors: float

    @property
    def seconds(self) -> float:
        """Wall seconds of the job."""
        return float(self.estimate.seconds(self.rates.share, self.processors))

    def wall(self, step: Step) -> float:
        """Wall seconds of one of its steps."""
        return float(step.wall(self.rates.share, self.processors))

    @property
    def fits(self) -> bool:
        """Whether the job would run."""
        return not self.lacking


def plan(job: str, config: Run, plan_config: PlanConfig) -> Path:
    """Print the plan of a composed job and write report.json, and nothing else; returns its path.

    UserError for a job without a plan, for malformed sizes, and for options that the job itself would refuse.
    """
    started = perf_counter()
    planned = make_plan(job, config, plan_config)
    folder = Path(config.run_dir or default_folder("plan"))
    text = "\n\n".join(tables(job, planned))
    print(text)
    report: Record = {
        "job": "plan",
        "plan_of": job,
        "config": plain(config),
        "metrics": metrics(planned) | {"seconds": perf_counter() - started},
        "layers": [],
        "output": None,
        "plan": {"cluster": dataclasses.asdict(plan_config), **_plain(planned)},
    }
    path = folder / "report.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    return path


def make_plan(name: str, config: Run, plan_config: PlanConfig, rates: Rates | None = None) -> Planned:
    """The plan of a composed job; rates=None measures the rates of this machine."""
    nodes, gpus = _nodes(config, plan_config)
    job = planned_job(name)
    rates = _rates(plan_config, gpus, job.shapes_of(config, gpus), config, rates)
    free = _disk(plan_config, config)

    def evaluate(changed: Run) -> tuple[Estimate, Placement, list[str]]:
        setting = Setting(rates, gpus, nodes[0].gpu_memory, len(nodes), plan_config.tokens_per_pass)
        estimate = estimates.estimate(job, changed, setting)
        return estimate, *_placed(estimate, nodes, free)

    estimate, placement, lacking = evaluate(config)
    # GPUs compute in parallel, whatever the number of processors.
    processors = float("inf") if gpus else sum(node.cpus for node in nodes)

    def judge(changed: Run) -> tuple[float, list[str]]:
        changed_estimate, _, changed_lacking = evaluate(changed)
        return changed_estimate.seconds(rates.share, processors), changed_lacking

    advice = advise(config, judge) if lacking else []
    return Planned(_with_notes(estimate, nodes, gpus, plan_config), placement, rates, lacking, advice, processors)


def plan_words(name: str, words: list[str]) -> Path:
    """Plan the job of a command line, whose words include the plan's own options."""
    job = planned_job(name)
    plan_config, remaining = parse_words(words)
    return plan(name, compose(name, job.options, remaining), plan_config)


def metrics(planned: Planned) -> Record:
    """Metrics of a plan; planned_peak_bytes and planned_gpu_bytes are those of the largest process."""
    processes = planned.estimate.processes
    return {
        "planned_seconds": planned.seconds,
        "planned_cpu_seconds": planned.estimate.cpu_seconds,
        "planned_peak_bytes": max(process.peak_bytes for process in processes),
        "planned_gpu_bytes": max(process.device_bytes for process in processes),
        "planned_moved_bytes": planned.estimate.moved_bytes,
        "planned_written_bytes": planned.estimate.written_bytes,
        "fits": planned.fits,
    }


def tables(job: str, planned: Planned) -> list[str]:
    """Text blocks to print: memory, placement, bytes, time, and what does not fit."""
    estimate = planned.estimate
    memory = []
    for process in estimate.processes:
        on_gpu = bool(process.device)
        for where, peak, parts in (
            ("GPU", process.device_bytes, process.device_parts),
            ("memory", process.peak_bytes, process.peak_parts),
        ):
            if peak and (on_gpu or where == "memory"):
                largest = sorted(parts.items(), key=lambda part: -part[1])
                words = ", ".join(f"{name} {readable(size)}" for name, size in largest if size)
                memory.append([process.kind, str(process.count), where, readable(peak), words])
    text = [f"plan of hasten {job}", table(["process", "number", "of", "peak", "parts"], memory)]
    used = [(number, node) for number, node in enumerate(planned.placement.nodes) if node.processes]
    rows = []
    for numbers, one in _grouped_nodes(used):
        inside = ", ".join(f"{count} {kind}" for kind, count in one.processes.items())
        of = f"{readable(one.memory)} of {readable(one.node.memory)}"
        rows.append([numbers, inside, of, f"{one.gpus:g} of {one.node.gpus}"])
    text.append(table(["nodes", "processes", "memory", "GPUs"], rows))
    sizes = [["moved", name, readable(size)] for name, size in estimate.moved.items()]
    sizes += [["written", name, readable(size)] for name, size in estimate.written.items()]
    sizes.append(["written", "together", readable(estimate.written_bytes)])
    text.append(table(["bytes", "of", "size"], sizes))
    times = [[step.label, f"{planned.wall(step):.3g}", f"{step.cpu_seconds:.3g}"] for step in estimate.steps]
    times.append(["together", f"{planned.seconds:.3g}", f"{estimate.cpu_seconds:.3g}"])
    text.append(table(["step", "seconds", "seconds of all processes"], times))
    text += [f"note: {note}" for note in estimate.notes]
    if planned.fits:
        text.append("fits: yes")
    else:
        text.append("\n".join(["fits: no", *(f"does not fit: {reason}" for reason in planned.lacking)]))
        advice = [" ".join(f"{key}={value}" for key, value in row) for row in planned.advice]
        text.append("\n".join(f"fits with: {options}" for options in advice) or "no option makes it fit")
    return text


def readable(size: float) -> str:
    """Bytes as text, with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def _grouped_nodes(used: list[tuple[int, Placed]]) -> list[tuple[str, Placed]]:
    """A row for each run of nodes with the same processes: their numbers as a range, and one of them."""
    groups: list[tuple[list[int], Placed]] = []
    for number, node in used:
        if groups and groups[-1][1].processes == node.processes:
            groups[-1][0].append(number)
        else:
            groups.append(([number], node))
    ends = [(members[0] + 1, members[-1] + 1) for members, _ in groups]
    ranges = [f"{first}" if first == last else f"{first} to {last}" for first, last in ends]
    return [(text, node) for text, (_, node) in zip(ranges, groups, strict=True)]


def _nodes(config: Run, plan_config: PlanConfig) -> tuple[list[Node], int]:
    """Nodes of the cluster, and the number of GPUs of every worker."""
    local_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = local_gpus if plan_config.gpus is None else plan_config.gpus
    device = getattr(config, "device", "cpu")
    if device == "cuda" and not gpus:
        raise UserError("device=cuda, but the cluster has no GPU: give plan.gpus, or device=cpu")
    memory = size_of(plan_config, "memory")
    gpu_memory = size_of(plan_config, "gpu_memory")
    if gpu_memory is None:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory if local_gpus else _GPU_MEMORY
    node = Node(
        cpus=plan_config.cpus or usable_cores(),
        # Memory in use by other programs is not available.
        memory=memory or psutil.virtual_memory().available,
        gpus=gpus,
        gpu_memory=gpu_memory,
        # A Ray cluster that a job starts offers as many processors as the job asks for.
        grows=plan_config.cpus is None and plan_config.nodes == 1 and getattr(config, "address", None) is None,
    )
    return [node] * plan_config.nodes, 1 if gpus and device != "cpu" else 0


def _rates(plan_config: PlanConfig, gpus: int, shapes: Shapes, config: Run, known: Rates | None = None) -> Rates:
    """Rates of this machine, overridden by assumed rates of GPUs and by the plan's options."""
    # Rates are measured on a product of the model's own shape, bounded so that measuring stays short.
    width, inner = min(shapes.hidden, 2048), min(shapes.inner, 8192)
    folder = Path(getattr(config, "output", None) or ".").absolute()
    kind = torch.float32 if gpus else shapes.dtype
    rates = known or measured.measure(kind, getattr(config, "threads", 1), width, inner, folder)
    changed: Record = {}
    if gpus:
        changed = {
            "flops": measured.GPU_FLOPS if shapes.dtype.itemsize == 2 else measured.GPU_EXACT_FLOPS,
            "exact_flops": measured.GPU_EXACT_FLOPS,
            "memory": measured.GPU_MEMORY,
            "elements": measured.GPU_MEMORY / 8,
            "launch": measured.GPU_LAUNCH,
        }
    rate_names = {"network": "network", "disk_speed": "disk", "memory_speed": "memory"}
    changed |= {rate: size_of(plan_config, name) for name, rate in rate_names.items() if getattr(plan_config, name)}
    for name in ("flops", "exact_flops", "launch"):
        if getattr(plan_config, name) is not None:
            changed[name] = getattr(plan_config, name)
    if gpus and plan_config.memory_speed:
        changed["elements"] = changed["memory"] / 8
    if plan_config.disk_speed:
        changed["read"] = changed["disk"]
    if plan_config.nodes > 1 or plan_config.gpus is not None:
        # Assume that nothing else runs on another cluster.
        changed["share"] = 1.0
    return dataclasses.replace(rates, **changed)


def _disk(plan_config: PlanConfig, config: Run) -> int:
    """Free bytes where the job writes."""
    free = size_of(plan_config, "disk")
    if free is not None:
        return free
    folder = Path(getattr(config, "output", None) or ".").expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _placed(estimate: Estimate, nodes: list[Node], free: int) -> tuple[Placement, list[str]]:
    """The placement of the processes, and a sentence for everything that fits nowhere."""
    # Ray spills the part of the object store that does not fit to disk.
    room = int(_STORE_SHARE * sum(node.memory for node in nodes))
    placement = place(estimate.processes, nodes, min(estimate.store, room))
    lacking = []
    for refusal in placement.refused:
        is_bytes = refusal.resource in ("memory", "gpu_memory")
        needed, available = (
            readable(size) if is_bytes else f"{size:g}" for size in (refusal.needed, refusal.available)
        )
        resource = _RESOURCES[refusal.resource]
        lacking.append(
            f"{refusal.count} {refusal.kind}: each needs {needed} of {resource}, "
            f"and no node has more than {available} left"
        )
    if estimate.written_bytes > free:
        lacking.append(f"files: {readable(estimate.written_bytes)} are written, and {readable(free)} are free")
    return placement, lacking


def _with_notes(estimate: Estimate, nodes: list[Node], gpus: int, plan_config: PlanConfig) -> Estimate:
    notes = list(estimate.notes)
    room = _STORE_SHARE * sum(node.memory for node in nodes)
    if estimate.store > room:
        spilled = readable(estimate.store - room)
        notes.append(f"the object store holds {readable(room)}: Ray writes {spilled} of it to disk, block by block")
    if gpus and plan_config.flops is None:
        notes.append("rates of the GPUs are assumed, of an H100: plan.flops, plan.exact_flops, plan.memory_speed")
    if len(nodes) > 1 and plan_config.network is None:
        notes.append("10 Gbit/s between nodes are assumed: plan.network")
    return dataclasses.replace(estimate, notes=tuple(notes))


def _plain(planned: Planned) -> Record:
    """The plan as JSON values."""
    return {
        "fits": planned.fits,
        "lacking": planned.lacking,
        "advice": [dict(row) for row in planned.advice],
        "rates": dataclasses.asdict(planned.rates),
        "processes": [
            {
                "kind": process.kind,
                "count": process.count,
                "cpus": process.cpus,
                "gpus": process.gpus,
                "peak_bytes": process.peak_bytes,
                "parts": dict(process.peak_parts),
                "gpu_bytes": process.device_bytes,
                "gpu_parts": dict(process.device_parts),
            }
            for process in planned.estimate.processes
        ],
        "nodes": [
            {
                "processes": node.processes,
                "memory_bytes": node.memory,
                "gpus": node.gpus,
                "gpu_bytes": node.gpu_memory,
            }
            for node in planned.placement.nodes
            if node.processes
        ],
        "moved_bytes": dict(planned.estimate.moved),
        "store_bytes": planned.estimate.store,
        "written_bytes": dict(planned.estimate.written),
        "steps": [
            {"step": step.name, "seconds": planned.wall(step), "cpu_seconds": step.cpu_seconds}
            for step in planned.estimate.steps
        ],
        "notes": list(planned.estimate.notes),
    }
