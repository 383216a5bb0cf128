"""`hasten search`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import CHECKPOINT, Metric
from hasten.jobs.search.options import SearchConfig

JOB = Job(
    name="search",
    position=30,
    options=SearchConfig,
    run="hasten.jobs.search.run:run",
    estimate="hasten.jobs.search.estimate:estimate",
    metrics=(
        *CHECKPOINT,
        Metric("budget_bits_per_weight", "bits of the budget used"),
        Metric("budget_spent", "budget used, in budget_unit"),
    ),
    objectives=("kl_divergence", "bytes"),
    examples=(
        "hasten search budget=3.2",
        "hasten search model=/models/llama levels=/models/llama-levels budget=3.2 output=/models/llama-3.2 workers=8",
        "hasten search budget=[2.5,3,4] allocator=exact compare=[uniform,baq]",
        "hasten search budget=4 sparsities=[0.5,0.75] drop=[block]",
        "hasten search budget=5.5 budget_unit=milliseconds hardware=h100 latency.tokens=16",
    ),
)
