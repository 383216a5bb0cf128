"""`hasten fit_scaling`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job, Needs
from hasten.jobs.descriptors.metrics import Metric
from hasten.jobs.fit_scaling.options import FitScalingConfig

JOB = Job(
    name="fit_scaling",
    position=85,
    options=FitScalingConfig,
    run="hasten.jobs.fit_scaling.run:run",
    needs="hasten.jobs.fit_scaling.job:needs",
    not_planned="it takes a second",
    in_ray=False,
    metrics=(
        Metric("r_squared", "explained variance", "%", "maximize", 0.01),
        Metric("speed_up", "predicted speed-up", "", "maximize"),
    ),
    objectives=("speed_up",),
    examples=(
        "hasten fit_scaling rows=runs/sweep target_ms=42 draft_ms_per_million=0.4",
        "hasten fit_scaling rows=drafts.csv acceptance=tau budget_flops=1e15",
    ),
)


def needs(config: FitScalingConfig) -> Needs:
    """One CPU."""
    return Needs(1.0, 0.0, 1)
