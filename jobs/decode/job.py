"""`hasten decode`: the descriptor."""

from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import DRAFT_ACCEPTANCE_RATE, Metric

JOB = Job(
    name="decode",
    position=50,
    options=DecodeConfig,
    run="hasten.jobs.decode.run:run",
    estimate="hasten.jobs.decode.estimate:estimate",
    needs="hasten.jobs.decode.needs:needs",
    shapes="hasten.jobs.decode.estimate:shapes",
    metrics=(
        Metric("tokens_per_second", "tokens a second", "", "maximize"),
        Metric("mean_acceptance_length", "tokens a pass", "", "maximize"),
        DRAFT_ACCEPTANCE_RATE,
        Metric("target_efficiency", "target efficiency", "", "maximize"),
    ),
    objectives=("tokens_per_second", "mean_acceptance_length"),
    output_in_run_dir=True,
    examples=(
        "hasten decode",
        "hasten decode target=/models/llama draft=/models/llama-small drafter=draft_model prompts=prompts.jsonl "
        "output=completions.jsonl",
        "hasten decode prompts=gsm8k.jsonl prompt_field=question temperature=0.8 top_p=0.95 workers=8",
        "hasten decode draft_tokens=0 stream=true",
    ),
)
