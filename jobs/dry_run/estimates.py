"""From a job's config to what it will take: the models' shapes, and the arithmetic of hasten.accel.costs over them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError

# Of the library's own prompts: how many, their mean and their greatest length.
_LIBRARY_PROMPTS, _MEAN_PROMPT, _LONGEST_PROMPT = 16, 94, 128


# CPU seconds of Ray's own processes, in those of a worker's start.
_RAY_STARTS = 2


@dataclass(frozen=True)
class Setting:
    """What a plan is made for beside the config.

    gpus: of every worker, gpu_memory: bytes of each; nodes: of the cluster; rates: of a process.
    """

    rates: Any
    gpus: int = 0
    gpu_memory: int = 0
    nodes: int = 1
    tokens_per_pass: float = 1.0


def estimate(job: str, config: Any, setting: Setting) -> Any:
    """hasten.accel.costs's Estimate of a job; UserError for a job that has no plan."""
    if job not in _JOBS:
        raise UserError(f"{job} has no plan: there are plans of {', '.join(_JOBS)}")
    found = _JOBS[job](config, setting)
    return _surrounded(found, setting.rates, job in ("compress", "levels", "search", "evaluate", "decode"))


def shapes(job: str, config: Any, gpus: int) -> tuple[Any, int, int]:
    """Dtype, hidden size and widest input of the model that a job computes most with: what rates are measured at."""
    if job == "pretrain":
        import torch

        training = getattr(config, config.models[0])
        return torch.float32, training.hidden_size, training.intermediate_size
    if job not in _JOBS:
        raise UserError(f"{job} has no plan: there are plans of {', '.join(_JOBS)}")
    # A replay runs no target.
    option = "draft" if job == "replay" and config.draft else "target" if hasattr(config, "target") else "model"
    model = _model(option, getattr(config, option), config, gpus)
    return model.dtype, model.hidden, model.inner


def _surrounded(found: Any, rates: Any, uses_ray: bool) -> Any:
    """With what every job takes: imports, Ray, the report."""
    from hasten.accel.costs.estimate import DRIVER, Process, Step

    # Evaluations count the start of their processes themselves.
    actors = [process for process in found.processes if process.kind not in (DRIVER, "evaluation")]
    steps = [Step("imports", rates.start, rates.start)]
    if uses_ray:
        # Ray's own processes import for themselves, beside each other.
        steps.append(Step("start Ray", rates.session, _RAY_STARTS * rates.start))
    if actors and uses_ray:
        stages, number = len({process.stage for process in actors}), sum(process.count for process in actors)
        steps.append(Step("start the actors", rates.start * stages, rates.start * number))
    processes = found.processes
    if all(process.kind != DRIVER for process in processes):
        processes += (Process(DRIVER, 1, 0, {"run": {"process": rates.driver_bytes}}),)
    steps += [*found.steps, Step("report", rates.finish, rates.finish)]
    return dataclasses.replace(found, processes=processes, steps=tuple(steps))


def _compress(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs.compression import estimate
    from hasten.jobs.compress.run import make_settings

    model = _model("model", config.model, config, setting.gpus)
    settings = make_settings(_resolved(config), model.architecture.checkpoint.path)
    found = estimate(_pass(model, settings, config, setting), setting.rates)
    return found.joined(_quality(config, model, setting))


def _levels(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs.compression import estimate

    return estimate(_levels_pass(config, setting), setting.rates)


def _levels_pass(config: Any, setting: Setting) -> Any:
    from hasten.jobs.levels.run import make_settings

    model = _model("model", config.model, config, setting.gpus)
    if not (config.bits or config.column_bits or config.sparsities or config.extra_levels):
        raise UserError("bits=[], column_bits=[] and sparsities=[] leave no level: give one or more of them")
    settings = make_settings(_resolved(config), model.architecture.checkpoint.path, Path("runs", "levels", "planned"))
    return _pass(model, settings, config, setting)


def _pass(model: Any, settings: Any, config: Any, setting: Setting) -> Any:
    from hasten.accel.compression.calibration.layer_groups import make_layer_groups
    from hasten.accel.costs.compression import Pass

    if model.architecture.checkpoint.is_compressed:
        raise UserError(f"model={config.model} is compressed already: give the original checkpoint")
    plan = make_layer_groups(model.architecture, settings.level, config.ignore, config.skip_first, config.skip_last)
    for level in settings.levels or ():
        for groups in plan:
            for group in groups:
                level.check(group.key, group.columns)
    sequences = config.calibration.sequences if settings.needs_hessian else 0
    if sequences and config.workers > min(config.calibration.shards, sequences):
        chunks = min(config.calibration.shards, sequences)
        raise UserError(
            f"workers={config.workers} is more than the {chunks} chunks of the calibration sequences: "
            f"use workers={chunks}, or more calibration.shards"
        )
    return Pass(
        model=model,
        plan=plan,
        methods=settings.methods,
        sequences=sequences,
        length=config.calibration.sequence_length,
        levels=settings.levels,
        batch=config.calibration.batch,
        shards=config.calibration.shards,
        workers=config.workers,
        threads=config.threads,
        gpus=setting.gpus,
        gpu_memory=setting.gpu_memory if setting.gpus else 0,
        nodes=min(setting.nodes, config.workers),
        propagates=config.propagate == "quantized",
    )


def _quality(config: Any, model: Any, setting: Setting) -> Any:
    """Measuring the checkpoint that comes out, in float32 and beside the original."""
    import torch

    from hasten.accel.costs import evaluation

    exact = dataclasses.replace(model, dtype=torch.float32)
    return evaluation.estimate(
        exact,
        _windows(config.evaluation),
        setting.rates,
        original=exact,
        packed=True,
        workers=config.workers,
        threads=config.threads,
        gpus=setting.gpus,
    )


def _windows(options: Any) -> Any:
    from hasten.accel.costs.evaluation import Windows

    length, stride = options.sequence_length, options.stride or options.sequence_length
    return Windows(-(-options.sequences * length // stride), length)


def _evaluate(config: Any, setting: Setting) -> Any:
    from hasten.accel.compression.outputs.resumable import original_of
    from hasten.accel.costs import evaluation

    if config.tasks:
        raise UserError(f"tasks=[{','.join(config.tasks)}] have no plan: lm-eval runs them; leave tasks out")
    model = _model("model", config.model, config, setting.gpus)
    folder = model.architecture.checkpoint.path
    original = config.original or original_of(folder)
    return evaluation.estimate(
        model,
        _windows(config.evaluation),
        setting.rates,
        original=None if original is None else _model("original", str(original), config, setting.gpus),
        packed=model.architecture.checkpoint.is_compressed,
        batch=config.batch,
        workers=config.workers,
        threads=config.threads,
        gpus=setting.gpus,
    )


def _search(config: Any, setting: Setting) -> Any:
    import torch

    from hasten.accel.compression.levels.database import LevelDatabase
    from hasten.accel.compression.levels.units import make_units
    from hasten.accel.costs import compression, search
    from hasten.accel.costs.estimate import Estimate
    from hasten.jobs.cli.methods import build, method_names, target_of

    work = _levels_pass(config, setting)
    model, budgets = work.model, config.budget
    checkpoint = model.architecture.checkpoint
    database = LevelDatabase(Path("planned"), checkpoint, work.plan, work.levels, None)
    units = make_units(database, config.grouping, config.keep, config.drop, solved=False)
    names = config.compare or method_names("allocator")
    allocators = [build(config.allocator)]
    if len(budgets) > 1:
        allocators += [build({"_target_": target_of("allocator", name)}) for name in names]
    allocators = list({type(each): each for each in reversed(allocators)}.values())
    measured = {"output": 0, "kl": sum(len(unit.choices) for unit in units), "kl_scaled": len(units)}
    logits = torch.zeros(1, model.vocabulary)
    kept = build(config.fitness).reference(logits, torch.zeros(1, dtype=torch.long))
    of_search = search.estimate(
        search.Search(
            model=model,
            sequences=config.search.sequences,
            length=config.search.sequence_length,
            error_sequences=config.search.error_sequences,
            levels=max(len(unit.choices) for unit in units),
            measured=measured[config.errors],
            allocators=tuple(allocators),
            budgets=len(budgets),
            original_bytes=sum(tensor.nbytes for tensor in kept.values()),
            batch=config.search.batch,
            workers=config.workers,
            threads=config.threads,
            gpus=setting.gpus,
        ),
        setting.rates,
    )
    levels = Estimate((), ()) if config.levels else compression.estimate(work, setting.rates)
    weights = sum(unit.weights for unit in units)
    names_ = [layer.name for groups in work.plan for group in groups for layer in group.layers]
    rest = model.stored_bytes() - sum(checkpoint.stored_bytes(f"{name}.weight") for name in names_)
    written = {f"checkpoint of {budget:g} bits": int(budget * weights / 8) + rest for budget in budgets}
    found = levels.joined(of_search).joined(dataclasses.replace(Estimate((), ()), written=written))
    for _ in budgets:
        found = found.joined(_quality(config, model, setting))
    return found


def _decode(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs import decoding
    from hasten.jobs.cli.methods import build

    target = _model("target", config.target, config, setting.gpus)
    drafter = build(config.drafter) if config.draft_tokens != 0 else None
    drafted = 0 if drafter is None else config.draft_tokens or config.max_draft_tokens
    draft = None
    if drafter is not None and drafter.needs_draft_model:
        if config.draft is None:
            raise UserError(f"drafter={type(drafter).__name__} needs a draft model: give draft=PATH")
        draft = _model("draft", config.draft, config, setting.gpus)
    prompts, mean, longest = _prompts(config, target)
    alone = config.stream
    return decoding.estimate(
        decoding.Decoding(
            target=target,
            prompts=prompts,
            prompt_tokens=mean,
            longest=longest + config.max_new_tokens,
            new_tokens=config.max_new_tokens,
            draft=draft,
            drafted=drafted,
            measures=config.draft_tokens is None,
            in_flight=1 if alone else config.in_flight,
            prefill_chunk=config.prefill_chunk,
            memory_bytes=config.memory_bytes,
            fast=_is_fast(config, target),
            workers=1 if alone else config.workers,
            threads=config.threads,
            gpus=setting.gpus,
            tokens_per_pass=setting.tokens_per_pass,
        ),
        setting.rates,
    )


def _is_fast(config: Any, model: Any) -> bool:
    from hasten.accel.decoding.targets.llama import refusal

    return config.path != "transformers" and refusal(model.architecture.config) is None


def _prompts(config: Any, target: Any) -> tuple[int, float, int]:
    """Number of prompts, their mean and their greatest length in tokens."""
    from hasten.jobs.common.prompts import read_prompts
    from hasten.jobs.common.tokenizer import load_tokenizer

    if config.prompts is None:
        return _LIBRARY_PROMPTS, _MEAN_PROMPT, _LONGEST_PROMPT
    tokenizer = load_tokenizer(target.architecture.checkpoint.path)
    found = read_prompts(Path(config.prompts), tokenizer, target.vocabulary, config.prompt_field, config.id_field)
    lengths = [len(each.tokens) for each in found]
    return len(lengths), sum(lengths) / len(lengths), max(lengths)


def _replay(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs import decoding
    from hasten.accel.costs.estimate import DRIVER, Estimate, Process, Step
    from hasten.jobs.cli.methods import build

    rates = setting.rates
    base, seconds = {"process": rates.driver_bytes}, 0.0
    phases = {"replay": base}
    steps = config.sequences * (config.sequence_length - config.prompt_length) * len(config.budgets)
    if build(config.drafter).needs_draft_model and config.draft is not None:
        draft = _model("draft", config.draft, config, setting.gpus)
        fast, on_device = _is_fast(config, draft), bool(setting.gpus)
        kept = {**base, "draft model": sum(decoding.weights(draft, fast, on_device).values())}
        phases = {
            "load": {**kept, "model as it is loaded": decoding.loaded_bytes(draft, fast)},
            "replay": {**kept, "draft model's caches": draft.token_bytes * config.sequence_length},
        }
        itemsize = decoding.itemsize_of(draft, fast, on_device)
        for budget in config.budgets:
            one = decoding.pass_work(draft, 1, 1, config.sequence_length, itemsize).seconds(rates)
            seconds += one * min(8, budget) * steps / len(config.budgets)
    seconds += steps * 300 * rates.launch
    process = Process(DRIVER, 1, config.threads, phases, setting.gpus)
    return Estimate((process,), (Step("replay", seconds, seconds),))


def _pretrain(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs.training import Training, pretrain

    trainings = []
    for name in config.models:
        one = getattr(config, name)
        if not one.depths:
            raise UserError(f"{name}.depths=[] is wrong: expected stages [layers, tokens], each 1 or more")
        trainings.append(
            Training(
                name=name,
                hidden=one.hidden_size,
                inner=one.intermediate_size,
                attention=one.heads * one.head_dim,
                key_values=one.kv_heads * one.head_dim,
                vocabulary=config.vocab_size,
                stages=[(layers, tokens) for layers, tokens in one.depths],
                batch=one.batch,
                length=one.sequence_length,
            )
        )
    return pretrain(trainings, config.workers, config.threads, setting.rates)


def _train_drafter(config: Any, setting: Setting) -> Any:
    from hasten.accel.costs.training import train_drafter

    text = config.text
    return train_drafter(
        _model("target", config.target, config, setting.gpus),
        _model("draft", config.draft, config, setting.gpus),
        text.sequences + text.held_out,
        text.sequence_length,
        text.batch,
        config.epochs,
        config.blocks,
        1 - config.mixing,
        setting.rates,
        setting.gpus,
    )


def _model(option: str, name: str, config: Any, gpus: int) -> Any:
    """hasten.accel.costs's Model of an option's checkpoint, in the config's dtype; UserError names the option."""
    from hasten.accel.costs.model import Model
    from hasten.jobs.common.arithmetic import resolve_dtype

    return Model(_architecture(option, name), resolve_dtype(config.dtype, "cuda" if gpus else "cpu"))


@cache
def _architecture(option: str, name: str) -> Any:
    from hasten.accel.costs.outline import open_checkpoint
    from hasten.accel.models.architecture import Architecture
    from hasten.accel.models.checkpoint import resolve

    try:
        return Architecture(open_checkpoint(resolve(name, weights=False).absolute()))
    except UserError as error:
        raise UserError(str(error).replace("model=", f"{option}=", 1)) from None


def _resolved(config: Any) -> Any:
    """The config with arithmetic that is there: settings are checked on this machine, which may have no GPU."""
    return dataclasses.replace(config, device="cpu", dtype="float32")


_JOBS: dict[str, Callable[[Any, Setting], Any]] = {
    "compress": _compress,
    "levels": _levels,
    "search": _search,
    "evaluate": _evaluate,
    "decode": _decode,
    "replay": _replay,
    "pretrain": _pretrain,
    "train_drafter": _train_drafter,
}
