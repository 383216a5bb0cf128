"""`hasten calibrate_cache`: the descriptor."""

from hasten.jobs.calibrate_cache.options import CalibrateCacheConfig
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import BYTES

JOB = Job(
    name="calibrate_cache",
    position=53,
    options=CalibrateCacheConfig,
    run="hasten.jobs.calibrate_cache.run:run",
    not_planned="a pass over few sequences, whose time is that of `hasten compress` without its solving",
    metrics=(BYTES,),
    examples=(
        "hasten calibrate_cache",
        "hasten calibrate_cache model=/models/llama method=[kvquant:bits=3,double_sparsity] workers=4",
        "hasten calibrate_cache model=/models/llama method=[cskv:key_rank=0.25] source=/data/texts.jsonl "
        "output=/models/llama-statistics",
    ),
)
