"""`hasten train_drafter`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import BYTES
from hasten.jobs.train_drafter.options import TrainDrafterConfig

JOB = Job(
    name="train_drafter",
    position=80,
    options=TrainDrafterConfig,
    run="hasten.jobs.train_drafter.run:run",
    estimate="hasten.jobs.train_drafter.estimate:estimate",
    needs="hasten.jobs.descriptors.needs:of_process",
    shapes="hasten.jobs.train_drafter.estimate:shapes",
    in_ray=False,
    metrics=(BYTES,),
    output_in_run_dir=True,
    examples=(
        "hasten train_drafter",
        "hasten train_drafter target=/models/llama draft=/models/llama-1b text.source=text.jsonl text.sequences=2048",
        "hasten train_drafter head=acceptance head.blocks=4",
    ),
)
