"""`hasten levels`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import BYTES
from hasten.jobs.levels.options import LevelsConfig

JOB = Job(
    name="levels",
    position=20,
    options=LevelsConfig,
    run="hasten.jobs.levels.run:run",
    estimate="hasten.jobs.levels.estimate:estimate",
    metrics=(BYTES,),
    examples=(
        "hasten levels",
        "hasten levels model=/models/llama bits=[2,3,4,5,6,8] output=/models/llama-levels workers=8",
        "hasten levels bits=[] sparsities=[0.25,0.5,0.75] pruner=wanda",
        "hasten levels bits=[3,4] column_bits=[2.5,3]",
    ),
)
