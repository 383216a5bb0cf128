"""Options of `hasten fit_scaling`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import Run, option


@dataclass
class FitScalingConfig(Run):
    """Fit scaling laws of acceptance to a sweep of trained drafts, and say which draft is best for a budget."""

    rows: str | None = option(
        None, "folder with report.json files of hasten train, or a .csv or .json file of rows; must be given", path="in"
    )
    parameters: str = option("parameters", "column with the number of parameters of a draft; of a report, its metric")
    tokens: str = option("train_tokens", "column with the number of training tokens; of a report, its metric")
    batch: str = option("batch", "column with the batch; of a report, its metric or an option such as train.batch")
    acceptance: str = option(
        "tokens_per_step", "column with the tokens of a pass of the target; of a report, its metric"
    )
    confidence: float = option(0.95, "probability of the intervals", at_least=0.5, at_most=0.999)
    target_ms: float = option(100.0, "milliseconds of a pass of the target over one token", at_least=1e-6)
    verify_cost: float = option(
        1.0, "time of a pass of the target over a draft divided by that of a pass over one token", at_least=0.1
    )
    draft_ms_per_million: float = option(
        0.5, "milliseconds of a pass of the draft for a million of its parameters", at_least=0
    )
    draft_ms: float = option(0.0, "milliseconds of a pass of the draft that no parameters cost", at_least=0)
    depth: int = option(5, "tokens of a draft, each a pass of the draft", at_least=1)
    budget_flops: float | None = option(
        None, "operations of the draft's training, 6 for each parameter and token; null sets no bound", at_least=1
    )
    max_tokens: float | None = option(
        None, "training tokens of the draft; null is as many as the rows have at most", at_least=1
    )
    reach: float = option(1.0, "factor by which sizes may be beyond those of the rows", at_least=1)
