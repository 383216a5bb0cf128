"""`hasten cache`: the descriptor."""

from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import KL_DIVERGENCE, PERPLEXITY, TOP1_AGREEMENT, Metric

JOB = Job(
    name="cache",
    position=55,
    options=CacheConfig,
    run="hasten.jobs.cache.run:run",
    estimate="hasten.jobs.cache.estimate:estimate",
    metrics=(
        KL_DIVERGENCE,
        PERPLEXITY,
        TOP1_AGREEMENT,
        Metric("bytes_end", "bytes held", "MiB", "minimize", 2.0**20),
        Metric("recall", "answers' tokens recalled", "%", "maximize", 0.01),
        Metric("tokens_per_second", "tokens a second", "", "maximize"),
    ),
    objectives=("kl_divergence", "bytes_end"),
    examples=(
        "hasten cache",
        "hasten cache method=[snapkv,h2o,streaming_llm] budget=[0.125,0.25,0.5]",
        "hasten cache model=/models/llama method=[kivi:bits=4,gear,fp8] context=4096 workers=4",
    ),
)
