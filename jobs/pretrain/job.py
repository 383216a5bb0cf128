"""`hasten pretrain`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job, Needs
from hasten.jobs.pretrain.options import PretrainConfig


def needs(config: PretrainConfig) -> Needs:
    """Resources of a run; its workers are processes outside of Ray."""
    return Needs(float(config.workers * config.threads), 0.0, config.threads)


JOB = Job(
    name="pretrain",
    position=70,
    options=PretrainConfig,
    run="hasten.jobs.pretrain.run:run",
    estimate="hasten.jobs.pretrain.estimate:estimate",
    needs="hasten.jobs.pretrain.job:needs",
    shapes="hasten.jobs.pretrain.estimate:shapes",
    in_ray=False,
    examples=(
        "hasten pretrain",
        "hasten pretrain models=[draft] output=/models/mine workers=8",
        "hasten pretrain models=[recall]",
    ),
)
