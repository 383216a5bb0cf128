"""Speculative decoding against transformers: tokens per second, acceptance, sequences in flight, learning."""

import gc
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.bench._markdown import default_document, replace_section, table
from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, Run, option

LOG = logging.getLogger(__name__)
HEADING = "decode: speculative decoding against transformers"
# Drafters that are drawn, at temperature 1, each with the verifier that is made for it and a budget of so many nodes.
_SAMPLED_BUDGET = 8
_SAMPLED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("draft_model", "speculative_sampling", {"length": 8}),
    ("spectr", "recursive_rejection", {"paths": 2, "length": 4}),
    ("spectr", "k_sequential", {"paths": 2, "length": 4}),
    ("rsd_constant", "recursive_rejection", {"branching": (2, 1, 1, 1)}),
    ("rsd_beam", "recursive_rejection", {"width": 2, "length": 4}),
    ("dyspec", "recursive_rejection", {}),
)
# Nodes of drafts that two workers share.
_SHARED_BUDGET = 16
_LEARNING = ("token_recycling", "aded", "stand")


@dataclass
class Config(Run):
    """Decode the same prompts in every way, one after the other in one process, by CPU time."""

    target: str = option("embedded:target", f"the target: {MODEL}")
    draft: str = option("embedded:draft", f"the draft model: {MODEL}")
    prompts: list[str] = option(
        [], "JSON Lines files FILE:FIELD, a table each; [] takes prompts from the held-out standard library"
    )
    count: int = option(50, "prompts of each file, the first ones", at_least=1)
    prompt_tokens: int = option(384, "tokens of a prompt that are used, the last ones", at_least=2)
    max_new_tokens: int = option(64, "tokens to decode for every prompt", at_least=1)
    drafters: list[str] = option([], "drafters in the table; [] is all that there are")
    head: str | None = option(None, "acceptance head of specdec_pp; null is the one beside the draft model")
    max_draft_tokens: int = option(32, "largest tree", at_least=1)
    in_flight: int = option(8, "sequences at once in the second table", at_least=2)
    dtype: str = option("float32", "dtype of both models", choices=DTYPES)
    device: str = option("auto", "where to compute; auto is cuda where there is one", choices=DEVICES)
    compiled: bool = option(False, "compile the fast path; takes a while for every size of a tree")
    sampled: bool = option(True, "compare sampled drafters, too")
    shared: bool = option(True, "compare a drafter that two workers share with one in each")
    threads: int = option(1, "threads", at_least=1)
    document: str | None = option(None, "Markdown file for the tables; null is docs/benchmarks.md of the checkout")


@dataclass
class _Row:
    """What one way of decoding took: same counts prompts whose tokens are those of generate."""

    name: str
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    same: int = 0
    drafted: float = 0.0
    target_share: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(config: Config) -> Path:
    """Path of the report; the tables are printed and put into the document."""
    import torch

    from hasten.cluster.runtime.resources import peak_rss_bytes
    from hasten.jobs.bench._markdown import provenance
    from hasten.jobs.cli.compose import plain
    from hasten.jobs.common.run import start, tracked

    torch.set_num_threads(config.threads)
    bench = _Bench(config)
    folder = start(config)
    with tracked(config, "bench decode", folder) as tracker:
        tracker.params(plain(config))
        parts = [provenance(), bench.costs_table()]
        metrics: dict[str, Any] = {}
        for label, prompts in bench.prompts.items():
            rows, distinct = bench.speeds(prompts)
            parts.append(_speed_table(label, rows, len(prompts) - 1, config.max_new_tokens, distinct))
            LOG.info("%s", parts[-1])
            metrics |= _speed_metrics(label, rows)
        first = next(iter(bench.prompts.values()))[1:]
        flights = bench.flights(first)
        parts.append(_flight_table(flights, config.in_flight))
        metrics |= {f"in_flight.{name}": many / one for name, (one, many) in flights.items()}
        learned = bench.learning(first)
        parts.append(_learning_table(learned))
        metrics |= {f"learning.{name}": quarters[-1] / quarters[0] for name, quarters in learned.items()}
        if config.sampled:
            sampled = bench.sampled(first)
            parts.append(_sampled_table(sampled))
            metrics |= {f"sampled.{name}": length for name, (length, _) in sampled.items()}
        if config.shared:
            shared = _shared(config, folder, first)
            parts.append(_shared_table(shared))
            metrics |= {f"shared.{name}": length for name, (length, _) in shared.items()}
        metrics |= {"cpu_seconds": process_time(), "peak_rss_bytes": peak_rss_bytes()}
        text = "\n\n".join(parts)
        replace_section(Path(config.document) if config.document else default_document(folder), HEADING, text)
        print(text, flush=True)
        tracker.metrics(metrics)
        report = {"job": "bench decode", "config": plain(config), "metrics": metrics, "output": str(folder)}
        return tracker.report(report)


class _Bench:
    """Models, prompts and the ways to decode them."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        from hasten.accel.decoding.drafters.base import Models
        from hasten.accel.decoding.lengths.sizing import measure_costs
        from hasten.accel.decoding.targets.loading import load_target
        from hasten.accel.models.checkpoint import resolve
        from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
        from hasten.jobs.common.tokenizer import load_tokenizer

        self._config = config
        self._device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, self._device)
        target, draft = resolve(config.target), resolve(config.draft)
        self.tokenizer = load_tokenizer(target)
        self.prompts = dict(self._prompts())

        def load(folder: Path) -> Any:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            # As many tokens from every way to decode: none stops before the others.
            model.generation_config.eos_token_id = None
            return model.to(self._device).eval()

        self._model, self._assistant = load(target), load(draft)
        self.target = load_target(target, dtype, self._device, compiled=config.compiled)
        self._models = Models(
            self.target.vocabulary, lambda: load_target(draft, dtype, self._device, keeps_hidden=True), draft
        )
        widths = [width for width in (1, 2, 4, 8, 16, 32, 64) if width <= 2 * config.max_draft_tokens]
        self.costs = measure_costs(self.target, widths, config.in_flight)

    def _prompts(self) -> Iterator[tuple[str, list[list[int]]]]:
        """Prompts of every source, one more than asked for, which warms up."""
        from hasten.accel.data.tokens import load_tokens

        config = self._config
        if not config.prompts:
            windows = load_tokens("library", self.tokenizer, config.count + 1, 128, split="held_out", seed=config.seed)
            yield "library", windows.tolist()
        for source in config.prompts:
            path, _, field = source.rpartition(":")
            try:
                with Path(path).open(encoding="utf-8") as file:
                    texts = [json.loads(line)[field] for _, line in zip(range(config.count + 1), file, strict=False)]
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"prompts={source} cannot be read as FILE:FIELD of JSON Lines: {error!r}") from error
            if len(texts) < 2:
                raise UserError(f"prompts={source} has {len(texts)} lines, and 2 at least are needed")
            assert self.tokenizer is not None, "text without a tokenizer"
            yield Path(path).stem, [self.tokenizer(text)["input_ids"][-config.prompt_tokens :] for text in texts]

    def _names(self) -> list[str]:
        from hasten.jobs.cli.methods import method_names

        known = method_names("drafter")
        unknown = [name for name in self._config.drafters if name not in known]
        if unknown:
            raise UserError(f"drafters={unknown[0]} is wrong: expected any of {', '.join(known)}")
        return self._config.drafters or known

    def _drafter(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        from dataclasses import replace

        import yaml

        from hasten.jobs.cli.methods import CONF, build

        found = build(yaml.safe_load((CONF / "drafter" / f"{name}.yaml").read_text(encoding="utf-8")))
        if name == "specdec_pp":
            options = {"head": self._config.head, **(options or {})}
        return replace(found, **options) if options else found

    def _engine(self, drafter: Any, in_flight: int = 1, policy: Any = None, verifier: Any = None) -> Any:
        from hasten.accel.decoding.engine import Engine
        from hasten.accel.decoding.lengths.sizing import Adaptive

        if drafter is not None and policy is None:
            policy = Adaptive(self.costs, self._config.max_draft_tokens)
        return Engine(self.target, drafter, verifier, models=self._models, policy=policy, in_flight=in_flight)

    def _requests(self, prompts: Sequence[list[int]], temperature: float = 0.0) -> list[Any]:
        from hasten.accel.decoding.engine import Request
        from hasten.accel.decoding.sampling import Sampling

        new, sampling = self._config.max_new_tokens, Sampling(temperature)
        return [Request(str(index), ids, new, sampling, seed=index) for index, ids in enumerate(prompts)]

    def _generate(self, ids: list[int], **options: Any) -> list[int]:
        import torch

        given = torch.tensor([ids], device=self._device)
        new = self._config.max_new_tokens
        out = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        found: list[int] = out[0, len(ids) :].tolist()
        return found

    def speeds(self, prompts: Sequence[list[int]]) -> tuple[list[_Row], float]:
        """A row for each way to decode, and the share of distinct tokens in what comes out.

        Every prompt is decoded in all ways before the next one, so that a machine that is busy for a while is busy for
        all. Each drafter keeps its memory and what the sizing learned from prompt to prompt.
        """
        from hasten.accel.decoding.stats import Figures
        from hasten.jobs.common.progress import Progress

        engines = {"hasten, plain": self._engine(None)}
        engines |= {name: self._engine(self._drafter(name)) for name in self._names()}
        peers: dict[str, dict[str, Any]] = {
            "transformers generate": {},
            "transformers, prompt lookup": {"prompt_lookup_num_tokens": 10},
            "transformers, assisted": {"assistant_model": self._assistant},
        }
        rows = {name: _Row(name) for name in (*peers, *engines)}
        figures: dict[str, list[Any]] = {name: [] for name in engines}
        distinct = 0.0
        with Progress("decoding", len(prompts) - 1, "prompt") as progress:
            # The first prompt warms everything up and does not count.
            for index, ids in enumerate(prompts):
                expected = None
                for name, options in peers.items():
                    started = process_time()
                    found = self._generate(ids, **options)
                    seconds = process_time() - started
                    expected = expected or found
                    if index:
                        _count(rows[name], seconds, found, expected)
                assert expected is not None
                for name, engine in engines.items():
                    started = process_time()
                    result = next(iter(engine.decode(self._requests([ids]))))
                    seconds = process_time() - started
                    if index:
                        _count(rows[name], seconds, result.token_ids, expected)
                        figures[name].append(result.figures)
                distinct += len(set(expected)) / len(expected) / (len(prompts) - 1) if index else 0.0
                gc.collect()
                progress.update(index, f"{rows['hasten, plain'].rate:.0f} tokens/s plain" if index else "")
        for name, each in figures.items():
            total = Figures.total(each)
            rows[name].passes = total.num_spec_steps
            rows[name].drafted = total.num_draft_tokens / total.num_spec_steps
            rows[name].target_share = total.metrics()["target_share"]
        return list(rows.values()), distinct

    def costs_table(self) -> str:
        """What a pass costs."""
        counts = list(self.costs.measured)
        widths = list(self.costs.measured[1])
        rows = [
            [f"{count} in flight", *(f"{1e3 * self.costs.measured[count][width]:.2f}" for width in widths)]
            for count in counts
        ]
        rows.append(["target efficiency, 1", *(f"{self.costs.efficiency(width):.2f}" for width in widths)])
        return "Milliseconds of a pass by tokens of each sequence, 128 tokens in the cache:\n\n" + table(
            ["sequences", *map(str, widths)], rows
        )

    def flights(self, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
        """Tokens per second with one sequence and with several in flight."""
        found = {}
        for name in ("plain", "prompt_lookup", *(["union"] if "union" in self._names() else [])):
            LOG.info("in flight: %s", name)
            rates = []
            for count in (1, self._config.in_flight):
                engine = self._engine(None if name == "plain" else self._drafter(name), count)
                started = process_time()
                made = sum(len(result.token_ids) for result in engine.decode(self._requests(prompts)))
                rates.append(made / (process_time() - started))
            found[name] = rates[0], rates[1]
        return found

    def learning(self, prompts: Sequence[list[int]]) -> dict[str, list[float]]:
        """Mean acceptance length of each quarter of the prompts, for drafters that learn; memory starts empty."""
        from hasten.accel.decoding.lengths.sizing import Fixed
        from hasten.accel.decoding.stats import Figures

        found = {}
        for name in _LEARNING:
            LOG.info("learning: %s", name)
            engine = self._engine(self._drafter(name), policy=Fixed(16))
            results = [next(iter(engine.decode([request]))) for request in self._requests(prompts)]
            cuts = [len(results) * quarter // 4 for quarter in range(5)]
            found[name] = [
                Figures.total(result.figures for result in results[first:last]).metrics()["mean_acceptance_length"]
                for first, last in itertools.pairwise(cuts)
                if last > first
            ]
        return found

    def sampled(self, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
        """Mean acceptance length and drafted nodes a pass at temperature 1, all with the same budget of nodes."""
        from hasten.accel.decoding.lengths.sizing import Fixed
        from hasten.accel.decoding.stats import Figures

        found = {}
        for drafter, verifier, options in _SAMPLED:
            LOG.info("sampled: %s, %s", drafter, verifier)
            engine = self._engine(self._drafter(drafter, options), 1, Fixed(_SAMPLED_BUDGET), self._verifier(verifier))
            total = Figures.total(result.figures for result in engine.decode(self._requests(prompts, 1.0)))
            found[f"{drafter}, {verifier}"] = (
                total.metrics()["mean_acceptance_length"],
                total.num_draft_tokens / total.num_spec_steps,
            )
        return found

    def _verifier(self, name: str) -> Any:
        import yaml

        from hasten.jobs.cli.methods import CONF, build

        return build(yaml.safe_load((CONF / "verifier" / f"{name}.yaml").read_text(encoding="utf-8")))


def _shared(config: Config, folder: Path, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
    """Mean acceptance length and tokens per second of two workers with an ADED drafter each, and with one of both."""
    from hasten.jobs.bench._runs import hasten_job

    options: dict[str, Any] = {
        "target": config.target,
        "drafter": "aded",
        "draft_tokens": _SHARED_BUDGET,
        "max_new_tokens": config.max_new_tokens,
        "workers": 2,
        "in_flight": 2,
        "threads": config.threads,
        "dtype": config.dtype,
        "device": config.device,
        "ignore_eos": "true",
        "overwrite": "true",
    }
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts), encoding="utf-8")
    options["prompts"] = path
    found = {}
    for placement in ("private", "shared"):
        LOG.info("two workers, placement=%s", placement)
        report, _ = hasten_job("decode", folder / placement, {**options, "placement": placement})
        metrics = report["metrics"]
        found[placement] = metrics["mean_acceptance_length"], metrics["tokens_per_second"]
    return found


def _shared_table(shared: Mapping[str, tuple[float, float]]) -> str:
    rows = [[name, f"{length:.3f}", f"{rate:.0f}"] for name, (length, rate) in shared.items()]
    return (
        f"ADED in two workers over the prompts of the first file, {_SHARED_BUDGET} nodes, memory empty at first:\n\n"
        + table(["placement", "mean acceptance length", "tokens/s"], rows)
    )


def _count(row: _Row, seconds: float, found: list[int], expected: list[int]) -> None:
    row.seconds += seconds
    row.tokens += len(found)
    row.same += found == expected


def _speed_table(label: str, rows: Sequence[_Row], prompts: int, new: int, distinct: float) -> str:
    by_name = {row.name: row for row in rows}
    generate, plain = by_name["transformers generate"], by_name["hasten, plain"]
    assisted = max(by_name[name].rate for name in ("transformers, prompt lookup", "transformers, assisted"))
    lines = [
        [
            row.name,
            f"{row.rate:.0f}",
            f"{row.rate / generate.rate:.2f}",
            f"{row.rate / assisted:.2f}",
            f"{row.rate / plain.rate:.2f}",
            f"{row.tokens / row.passes:.2f}" if row.passes else "",
            f"{row.drafted:.1f}" if row.passes else "",
            f"{row.target_share:.0%}" if row.passes else "",
            f"{row.same} of {prompts}",
        ]
        for row in rows
    ]
    head = [
        "",
        "tokens/s",
        "generate",
        "best assisted",
        "our plain",
        "tokens/pass",
        "drafted/pass",
        "time in target",
        "same tokens",
    ]
    return (
        f"**{label}**: {prompts} prompts, {new} greedy tokens each, batch 1, CPU time; columns three to five are "
        f"ratios of tokens per second. Share of distinct tokens in an output: {distinct:.0%}.\n\n" + table(head, lines)
    )


def _speed_metrics(label: str, rows: Sequence[_Row]) -> dict[str, float]:
    found = {}
    for row in rows:
        name = row.name.replace(", ", "_").replace(" ", "_")
        found[f"{label}.{name}.tokens_per_second"] = row.rate
        found[f"{label}.{name}.same"] = float(row.same)
    return found


def _flight_table(flights: Mapping[str, tuple[float, float]], count: int) -> str:
    rows = [[name, f"{one:.0f}", f"{many:.0f}", f"{many / one:.2f}"] for name, (one, many) in flights.items()]
    return f"Tokens per second with {count} sequences in flight:\n\n" + table(["", "1", str(count), "ratio"], rows)


def _learning_table(learned: Mapping[str, list[float]]) -> str:
    width = max(map(len, learned.values()))
    rows = [
        [name, *(f"{length:.2f}" for length in quarters), f"{quarters[-1] / quarters[0] - 1:+.0%}"]
        for name, quarters in learned.items()
    ]
    head = ["", *(f"quarter {number}" for number in range(1, width + 1)), "last to first"]
    return "Mean acceptance length as a drafter sees more text, 16 nodes, memory empty at first:\n\n" + table(
        head, rows
    )


def _sampled_table(sampled: Mapping[str, tuple[float, float]]) -> str:
    rows = [[name, f"{length:.3f}", f"{drafted:.1f}"] for name, (length, drafted) in sampled.items()]
    return (
        f"Mean acceptance length at temperature 1, at most {_SAMPLED_BUDGET} nodes of the same draft model:\n\n"
        + table(["drafter, verifier", "mean acceptance length", "nodes/pass"], rows)
    )
