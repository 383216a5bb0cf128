"""Cost estimate of `hasten search`."""

import dataclasses
from pathlib import Path

import torch

from hasten.accel.compression.allocators.budgets import check_budget
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.costs import compression, search
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.cli.methods import build, method_names, target_of
from hasten.jobs.dry_run.evaluation import quality
from hasten.jobs.dry_run.setting import Setting
from hasten.jobs.levels.estimate import levels_pass
from hasten.jobs.search.budget import SearchBudget
from hasten.jobs.search.options import SearchConfig


def estimate(config: SearchConfig, setting: Setting) -> Estimate:
    """Cost of the level database, unless it exists, of the search, and of writing and evaluating each checkpoint."""
    work = levels_pass(config, setting)
    model, budgets = work.model, config.budget
    checkpoint = model.architecture.checkpoint
    database = LevelDatabase(Path("planned"), checkpoint, work.layer_groups, work.levels or (), None)
    of_budget = SearchBudget.of(config, model.architecture, database)
    units = of_budget.units(config, database, solved=False)
    limits = {budget: of_budget.unit.limit(budget, units) for budget in budgets}
    for limit in limits.values():
        check_budget(units, limit, of_budget.unit)
    names = config.compare or method_names("allocator")
    allocators = [build(config.allocator)]
    if len(budgets) > 1:
        allocators += [build({"_target_": target_of("allocator", name)}) for name in names]
    allocators = list({type(allocator): allocator for allocator in reversed(allocators)}.values())
    parts = sum(not unit.layers for unit in units)
    measured = {
        "gradient": parts,
        "output": 0,
        "kl": sum(len(unit.choices) for unit in units),
        "kl_scaled": len(units),
        "autoquantize": parts,
    }
    logits = torch.zeros(1, model.vocabulary)
    kept = build(config.fitness).reference([(0, logits)], torch.zeros(1, dtype=torch.long))
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
            error_passes={"gradient": config.search.error_passes, "autoquantize": 1}.get(config.errors, 0),
        ),
        setting.rates,
    )
    levels = Estimate((), ()) if config.levels else compression.estimate(work, setting.rates)
    names_ = [layer.name for groups in work.layer_groups for group in groups for layer in group.layers]
    unquantized = model.stored_bytes() - sum(checkpoint.stored_bytes(f"{name}.weight") for name in names_)
    # Levels of any size may have the cost of a budget of time.
    largest = sum(max(choice.bits for choice in unit.choices) for unit in units)
    bits = {budget: limit if of_budget.unit.counts_bits else largest for budget, limit in limits.items()}
    written = {f"checkpoint of {budget:g} {of_budget.unit.name}": bits[budget] // 8 + unquantized for budget in budgets}
    total = levels.joined(of_search).joined(dataclasses.replace(Estimate((), ()), written=written))
    for _ in budgets:
        total = total.joined(quality(config.evaluation, config.workers, config.threads, model, setting))
    return total
