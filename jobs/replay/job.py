"""`hasten replay`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import DRAFT_ACCEPTANCE_RATE, Metric
from hasten.jobs.replay.options import ReplayConfig

JOB = Job(
    name="replay",
    position=60,
    options=ReplayConfig,
    run="hasten.jobs.replay.run:run",
    estimate="hasten.jobs.replay.estimate:estimate",
    needs="hasten.jobs.descriptors.needs:of_process",
    shapes="hasten.jobs.replay.estimate:shapes",
    in_ray=False,
    metrics=(
        Metric("tokens_per_step", "tokens a step", "", "maximize"),
        Metric("drafted_per_step", "drafted a step", "", None),
        DRAFT_ACCEPTANCE_RATE,
    ),
    objectives=("tokens_per_step",),
    examples=(
        "hasten replay",
        "hasten replay drafter=token_recycling recorded=completions.jsonl budgets=[16,64]",
        "hasten replay text=text.jsonl target=/models/llama drafter=prompt_lookup",
    ),
)
