"""`hasten search_cache`: the descriptor."""

from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import KL_DIVERGENCE, PERPLEXITY, TOP1_AGREEMENT, Metric
from hasten.jobs.search_cache.options import SearchCacheConfig

JOB = Job(
    name="search_cache",
    position=57,
    options=SearchCacheConfig,
    run="hasten.jobs.search_cache.run:run",
    estimate="hasten.jobs.search_cache.estimate:estimate",
    metrics=(
        KL_DIVERGENCE,
        PERPLEXITY,
        TOP1_AGREEMENT,
        Metric("cache_bytes_per_token", "cache for a token", "bytes"),
        Metric("uniform_kl_divergence", "KL divergence of the best uniform level that fits", "nats a token", None),
        Metric("interpolated_kl_divergence", "KL divergence between uniform levels", "nats a token", None),
    ),
    objectives=("kl_divergence", "cache_bytes_per_token"),
    examples=(
        "hasten search_cache",
        "hasten search_cache allocator=exact budget=[0.2,0.3,0.5] levels=[full,kivi:bits=4,kivi:bits=2]",
        "hasten search_cache model=/models/llama budget=16000 context=2048 workers=4",
    ),
)
