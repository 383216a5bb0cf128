"""Estimate memory, traffic, files and time of a job, on this machine or on a described cluster."""

from hasten.jobs.cli.commands._arguments import Parser
from hasten.jobs.cli.options import options
from hasten.jobs.dry_run.options import PREFIX, PlanConfig
from hasten.jobs.dry_run.planned import planned_jobs

_EXAMPLES = """examples:
  hasten plan compress model=/models/llama
  hasten plan compress model=/models/llama-405b workers=8 plan.nodes=8 plan.gpus=8 plan.gpu_memory=80GB plan.memory=1TB

The model's folder needs only a config.json. `hasten JOB … plan=true` does the same.
"""


def main(words: list[str]) -> int:
    """Plan a job and print it; returns 0 whether it fits or not."""
    shown = "\n".join(f"  {item.key:<22} {item.help}" for item in options(PlanConfig, PREFIX))
    parser = Parser("plan", f"{__doc__}\n\noptions of the plan:\n{shown}\n\n{_EXAMPLES}")
    parser.add_argument("job", help=f"one of {', '.join(planned_jobs())}")
    parser.add_argument("words", nargs="*", metavar="key=value", help="options of the job, and of the plan")
    arguments = parser.parse_args(words)
    # Imports torch, which --help must not wait for.
    from hasten.jobs.dry_run.run import plan_words

    print(f"report: {plan_words(arguments.job, arguments.words)}", flush=True)
    return 0
