"""Dry runs: what a job would hold, move, write and take, on this machine or on a cluster that is not there."""

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
from hasten.jobs.cli.compose import compose, plain
from hasten.jobs.common.logs import default_folder
from hasten.jobs.common.markdown import table
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Run
from hasten.jobs.dry_run import estimates
from hasten.jobs.dry_run.advice import Changes, advise
from hasten.jobs.dry_run.options import PlanConfig, parse_words, size_of
from hasten.jobs.dry_run.planned import planned_job
from hasten.jobs.dry_run.setting import Setting, Shapes

_GPU_MEMORY = 80 * 10**9
# Share of a node's memory that Ray gives its object store; what does not fit there goes to the disk.
_STORE_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan: the estimate, where its processes go, and what would make it fit.

    lacking: what fits nowhere, in words. advice: (option, value) pairs that make the job fit, one set a row, the
    quickest first. processors: that compute, all nodes together.
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
    """Print what a composed job would take, and write it; returns the path of report.json. Nothing else is written.

    UserError for a job without a plan, for sizes that are none, and for what the job itself would refuse.
    """
    started = perf_counter()
    found = make_plan(job, config, plan_config)
    folder = Path(config.run_dir or default_folder("plan"))
    text = "\n\n".join(tables(job, found))
    print(text)
    report: Record = {
        "job": "plan",
        "plan_of": job,
        "config": plain(config),
        "metrics": metrics(found) | {"seconds": perf_counter() - started},
        "layers": [],
        "output": None,
        "plan": {"cluster": dataclasses.asdict(plan_config), **_plain(found)},
    }
    path = folder / "report.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    return path


def make_plan(name: str, config: Run, plan_config: PlanConfig, rates: Rates | None = None) -> Planned:
    """The plan of a composed job; rates: None measures those of this machine."""
    nodes, gpus = _nodes(config, plan_config)
    job = planned_job(name)
    rates = _rates(plan_config, gpus, job.shapes_of(config, gpus), config, rates)
    free = _disk(plan_config, config)

    def tried(changed: Run) -> tuple[Estimate, Placement, list[str]]:
        setting = Setting(rates, gpus, nodes[0].gpu_memory, len(nodes), plan_config.tokens_per_pass)
        found = estimates.estimate(job, changed, setting)
        return found, *_placed(found, nodes, free)

    found, placement, lacking = tried(config)
    # GPUs compute beside each other, however few processors there are.
    processors = float("inf") if gpus else sum(node.cpus for node in nodes)

    def judged(changed: Run) -> tuple[float, list[str]]:
        other, _, lacks = tried(changed)
        return other.seconds(rates.share, processors), lacks

    advice = advise(config, judged) if lacking else []
    return Planned(_with_notes(found, nodes, gpus, plan_config), placement, rates, lacking, advice, processors)


def plan_words(name: str, words: list[str]) -> Path:
    """The plan of a job by the words of a command line, those of the plan among them."""
    job = planned_job(name)
    plan_config, rest = parse_words(words)
    return plan(name, compose(name, job.options, rest), plan_config)


def metrics(found: Planned) -> Record:
    """The plan's figures under names of their own; memory of the largest process."""
    processes = found.estimate.processes
    return {
        "planned_seconds": found.seconds,
        "planned_cpu_seconds": found.estimate.cpu_seconds,
        "planned_peak_bytes": max(process.peak_bytes for process in processes),
        "planned_gpu_bytes": max(process.device_bytes for process in processes),
        "planned_moved_bytes": found.estimate.moved_bytes,
        "planned_written_bytes": found.estimate.written_bytes,
        "fits": found.fits,
    }


def tables(job: str, found: Planned) -> list[str]:
    """What is printed: memory, placement, bytes, time, and what does not fit."""
    estimate = found.estimate
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
    used = [(number, each) for number, each in enumerate(found.placement.nodes) if each.processes]
    rows = []
    for numbers, one in _alike(used):
        inside = ", ".join(f"{count} {kind}" for kind, count in one.processes.items())
        of = f"{readable(one.memory)} of {readable(one.node.memory)}"
        rows.append([numbers, inside, of, f"{one.gpus:g} of {one.node.gpus}"])
    text.append(table(["nodes", "processes", "memory", "GPUs"], rows))
    sizes = [["moved", name, readable(size)] for name, size in estimate.moved.items()]
    sizes += [["written", name, readable(size)] for name, size in estimate.written.items()]
    sizes.append(["written", "together", readable(estimate.written_bytes)])
    text.append(table(["bytes", "of", "size"], sizes))
    times = [[step.label, f"{found.wall(step):.3g}", f"{step.cpu_seconds:.3g}"] for step in estimate.steps]
    times.append(["together", f"{found.seconds:.3g}", f"{estimate.cpu_seconds:.3g}"])
    text.append(table(["step", "seconds", "seconds of all processes"], times))
    text += [f"note: {note}" for note in estimate.notes]
    if found.fits:
        text.append("fits: yes")
    else:
        text.append("\n".join(["fits: no", *(f"does not fit: {each}" for each in found.lacking)]))
        advice = [" ".join(f"{key}={value}" for key, value in row) for row in found.advice]
        text.append("\n".join(f"fits with: {each}" for each in advice) or "no option makes it fit")
    return text


def readable(size: float) -> str:
    """Bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def _alike(used: list[tuple[int, Placed]]) -> list[tuple[str, Placed]]:
    """Nodes with the same processes together, their numbers as a range."""
    groups: list[tuple[list[int], Placed]] = []
    for number, each in used:
        if groups and groups[-1][1].processes == each.processes:
            groups[-1][0].append(number)
        else:
            groups.append(([number], each))
    return [(f"{own[0] + 1}" if len(own) == 1 else f"{own[0] + 1} to {own[-1] + 1}", each) for own, each in groups]


def _nodes(config: Run, plan_config: PlanConfig) -> tuple[list[Node], int]:
    """The cluster, and GPUs of every worker."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = here if plan_config.gpus is None else plan_config.gpus
    device = getattr(config, "device", "cpu")
    if device == "cuda" and not gpus:
        raise UserError("device=cuda, but the cluster has no GPU: give plan.gpus, or device=cpu")
    memory = size_of(plan_config, "memory")
    gpu_memory = size_of(plan_config, "gpu_memory")
    if gpu_memory is None:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory if here else _GPU_MEMORY
    node = Node(
        cpus=plan_config.cpus or usable_cores(),
        # What other programs hold is theirs.
        memory=memory or psutil.virtual_memory().available,
        gpus=gpus,
        gpu_memory=gpu_memory,
        # A Ray that a job starts offers as many processors as it is asked for.
        grows=plan_config.cpus is None and plan_config.nodes == 1 and getattr(config, "address", None) is None,
    )
    return [node] * plan_config.nodes, 1 if gpus and device != "cpu" else 0


def _rates(plan_config: PlanConfig, gpus: int, shapes: Shapes, config: Run, known: Rates | None = None) -> Rates:
    """Rates of this machine, and over them what is assumed of GPUs that are not here and what was given."""
    # A product of the model's own shape, as far as it is measured in a moment.
    width, inner = min(shapes.hidden, 2048), min(shapes.inner, 8192)
    folder = Path(getattr(config, "output", None) or ".").absolute()
    kind = torch.float32 if gpus else shapes.dtype
    found = known or measured.measure(kind, getattr(config, "threads", 1), width, inner, folder)
    changed: Record = {}
    if gpus:
        changed = {
            "flops": measured.GPU_FLOPS if shapes.dtype.itemsize == 2 else measured.GPU_EXACT_FLOPS,
            "exact_flops": measured.GPU_EXACT_FLOPS,
            "memory": measured.GPU_MEMORY,
            "elements": measured.GPU_MEMORY / 8,
            "launch": measured.GPU_LAUNCH,
        }
    given = {"network": "network", "disk_speed": "disk", "memory_speed": "memory"}
    changed |= {rate: size_of(plan_config, name) for name, rate in given.items() if getattr(plan_config, name)}
    for name in ("flops", "exact_flops", "launch"):
        if getattr(plan_config, name) is not None:
            changed[name] = getattr(plan_config, name)
    if gpus and plan_config.memory_speed:
        changed["elements"] = changed["memory"] / 8
    if plan_config.disk_speed:
        changed["read"] = changed["disk"]
    if plan_config.nodes > 1 or plan_config.gpus is not None:
        # Another cluster is taken to be calm.
        changed["share"] = 1.0
    return dataclasses.replace(found, **changed)


def _disk(plan_config: PlanConfig, config: Run) -> int:
    """Bytes that are free where a job writes."""
    given = size_of(plan_config, "disk")
    if given is not None:
        return given
    folder = Path(getattr(config, "output", None) or ".").expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _placed(estimate: Estimate, nodes: list[Node], free: int) -> tuple[Placement, list[str]]:
    """Where processes go, and what fits nowhere, in words."""
    # Of the object store what does not fit is on disk.
    room = int(_STORE_SHARE * sum(node.memory for node in nodes))
    placement = place(estimate.processes, nodes, min(estimate.store, room))
    lacking = []
    for each in placement.refused:
        is_bytes = each.resource in ("memory", "gpu_memory")
        needed, there = (readable(size) if is_bytes else f"{size:g}" for size in (each.needed, each.available))
        what = {"memory": "memory", "gpu_memory": "a GPU's memory", "cpus": "processors", "gpus": "GPUs"}[each.resource]
        lacking.append(
            f"{each.count} {each.kind}: each needs {needed} of {what}, and no node has more than {there} left"
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


def _plain(found: Planned) -> Record:
    """The plan as plain values."""
    return {
        "fits": found.fits,
        "lacking": found.lacking,
        "advice": [dict(row) for row in found.advice],
        "rates": dataclasses.asdict(found.rates),
        "processes": [
            {
                "kind": each.kind,
                "count": each.count,
                "cpus": each.cpus,
                "gpus": each.gpus,
                "peak_bytes": each.peak_bytes,
                "parts": dict(each.peak_parts),
                "gpu_bytes": each.device_bytes,
                "gpu_parts": dict(each.device_parts),
            }
            for each in found.estimate.processes
        ],
        "nodes": [
            {
                "processes": each.processes,
                "memory_bytes": each.memory,
                "gpus": each.gpus,
                "gpu_bytes": each.gpu_memory,
            }
            for each in found.placement.nodes
            if each.processes
        ],
        "moved_bytes": dict(found.estimate.moved),
        "store_bytes": found.estimate.store,
        "written_bytes": dict(found.estimate.written),
        "steps": [
            {"step": step.name, "seconds": found.wall(step), "cpu_seconds": step.cpu_seconds}
            for step in found.estimate.steps
        ],
        "notes": list(found.estimate.notes),
    }
