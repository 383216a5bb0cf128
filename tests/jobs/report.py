"""What users script against in report.json."""

METRICS = {
    "perplexity",
    "perplexity_original",
    "kl_divergence",
    "top1_agreement",
    "bits_per_weight",
    "bytes",
    "seconds",
    "cpu_seconds",
    "peak_rss_bytes",
}
