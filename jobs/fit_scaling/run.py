"""`hasten fit_scaling`: fits scaling laws to trained drafts, and chooses a draft."""

from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from hasten.accel.training.scaling_laws import Choice, Costs, Interval, Row, ScalingLaw, choices
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import logarithmic, new_axes, save
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.fit_scaling.options import FitScalingConfig
from hasten.jobs.fit_scaling.rows import read_rows

_AXES = {"parameters": "parameters of the draft", "tokens": "training tokens", "batch": "batch"}


def run(config: FitScalingConfig) -> Path:
    """Fit the law and choose; returns the path of report.json. UserError for rows that determine no law."""
    started = perf_counter()
    rows = read_rows(config)
    law = ScalingLaw.fit(rows, config.confidence)
    drafts, best = _choices(config, law)
    run_dir = start(config)
    with tracked(config, "fit_scaling", run_dir) as tracker:
        tracker.params(plain(config))
        tracker.figure(_plot(law, rows, run_dir / "laws.png"))
        metrics = {
            "rows": len(rows),
            "r_squared": law.r_squared,
            "residual": law.residual,
            **(
                {} if best is None else {"speed_up": best.speed_up.value, "best_parameters": best.factors["parameters"]}
            ),
            "seconds": perf_counter() - started,
            "cpu_seconds": cpu_seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        coefficients = dict(zip(("intercept", *law.names), map(asdict, law.coefficients), strict=True))
        path: Path = tracker.report(
            {
                "job": "fit_scaling",
                "config": plain(config),
                "metrics": metrics,
                "coefficients": coefficients,
                "constant": dict(law.constant),
                "best": None if best is None else asdict(best),
                "drafts": [asdict(draft) for draft in drafts],
                "output": str(run_dir),
            }
        )
    print("\n".join(_summary(config, law, best)))
    return path


def _choices(config: FitScalingConfig, law: ScalingLaw) -> tuple[list[Choice], Choice | None]:
    """Drafts of all sizes, and the fastest; none if the rows do not say how large the drafts are."""
    if "parameters" not in law.ranges:
        return [], None
    costs = Costs(
        config.target_ms * config.verify_cost,
        config.target_ms,
        config.depth,
        config.draft_ms_per_million,
        config.draft_ms,
    )
    drafts = choices(law, costs, config.budget_flops, config.max_tokens, config.reach)
    return drafts, max(drafts, key=lambda draft: draft.speed_up.value)


def _summary(config: FitScalingConfig, law: ScalingLaw, best: Choice | None) -> list[str]:
    cells = [
        [name, f"{one.value:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}"]
        for name, one in zip(
            ("at 1 of each", *(f"twice the {name}" for name in law.names)), law.coefficients, strict=True
        )
    ]
    lines = [
        table(["tokens of a pass", "", f"{config.confidence:.0%} interval"], cells),
        f"the law explains {law.r_squared:.1%} of the variance; around it, tokens of a pass deviate by "
        f"{law.residual:.3f}",
        *(f"all rows have {name} {value:g}, so that nothing is said about it" for name, value in law.constant.items()),
    ]
    if best is not None:
        beyond = "" if best.measured else "; this is beyond the rows, where laws break first"
        lines.append(
            f"best draft: {best.factors['parameters']:,.0f} parameters, trained on {best.factors['tokens']:,.0f} "
            f"tokens: {_text(best.acceptance)} tokens of a pass, {_text(best.speed_up)} times plain decoding{beyond}"
        )
    return lines


def _text(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _plot(law: ScalingLaw, rows: list[Row], path: Path) -> Path:
    """Tokens of a pass over the first factor: what was measured, and the law at the rows' other factors."""
    name = law.names[0]
    figure, axes = new_axes("Scaling law of acceptance", _AXES[name], "tokens of a pass")
    measured = [row.factors[name] for row in rows]
    low, high = law.ranges[name]
    line = [low * (high / low) ** (step / 32) for step in range(33)]
    others = {other: sorted(row.factors[other] for row in rows)[len(rows) // 2] for other in law.names}
    expected = [law.predict(**{**others, name: value}) for value in line]
    axes.plot(line, [one.value for one in expected], linewidth=1, label="law, at medians of other factors")
    axes.fill_between(line, [one.low for one in expected], [one.high for one in expected], alpha=0.15)
    axes.plot(measured, [row.acceptance for row in rows], "o", markersize=5, label="measured")
    logarithmic(axes.xaxis, measured)
    axes.legend(fontsize=8)
    return save(figure, path)
