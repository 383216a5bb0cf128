"""`hasten train`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import Metric
from hasten.jobs.train.options import TrainConfig

JOB = Job(
    name="train",
    position=75,
    options=TrainConfig,
    run="hasten.jobs.train.run:run",
    needs="hasten.jobs.descriptors.needs:of_process",
    estimate="hasten.jobs.train.estimate:estimate",
    shapes="hasten.jobs.train.estimate:shapes",
    in_ray=False,
    metrics=(
        Metric("mean_acceptance_length", "tokens a pass", "", "maximize"),
        Metric("untrained_acceptance_length", "tokens a pass before training", "", None),
        Metric("train_tokens_per_second", "training tokens a second", "", "maximize"),
    ),
    objectives=("mean_acceptance_length",),
    output_in_run_dir=True,
    examples=(
        "hasten train",
        "hasten train head=medusa target=/models/llama data=chat.jsonl data.generate=true output=/heads/medusa",
        "hasten train data=text.jsonl data.records=/scratch/records train.schedule=wsd "
        "train.acceptance_at=[50000,100000,200000,400000,800000]",
    ),
)
