"""`hasten kv_heads`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import BYTES
from hasten.jobs.kv_heads.options import KVHeadsConfig

JOB = Job(
    name="kv_heads",
    position=15,
    options=KVHeadsConfig,
    run="hasten.jobs.kv_heads.run:run",
    not_planned="a pass over few sequences, whose time is that of `hasten compress` without its solving",
    metrics=(BYTES,),
    examples=(
        "hasten kv_heads",
        "hasten kv_heads model=/models/llama group=4 output=/models/llama-2-kv-heads workers=4",
    ),
)
