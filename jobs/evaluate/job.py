"""`hasten evaluate`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import CHECKPOINT, Metric
from hasten.jobs.evaluate.options import EvaluateConfig

JOB = Job(
    name="evaluate",
    position=40,
    options=EvaluateConfig,
    run="hasten.jobs.evaluate.run:run",
    estimate="hasten.jobs.evaluate.estimate:estimate",
    # Metrics of lm-eval's tasks are named TASK.METRIC.
    metrics=(*CHECKPOINT, Metric("accuracy", "accuracy", "", "maximize")),
    objectives=("kl_divergence", "bytes"),
    examples=(
        "hasten evaluate",
        "hasten evaluate model=/models/llama-w3 original=/models/llama evaluation.stride=256",
        "hasten evaluate model=/models/llama-w3 tasks=[arc_easy,hellaswag]",
    ),
)
