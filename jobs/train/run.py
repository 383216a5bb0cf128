"""`hasten train`: trains a draft head for a target on its recorded hidden states."""

import shutil
from functools import cache, partial
from pathlib import Path
from time import perf_counter

import torch

from hasten.accel.data.chat import end_of_turn
from hasten.accel.data.documents import LIBRARY
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import PROGRESS, ResumableFolder
from hasten.accel.training.data.records import Records, RecordsMeta
from hasten.accel.training.heads.draft_head import CONFIG, DraftHead, TargetFacts, load_head
from hasten.accel.training.setup import SCORE, HeadSetup
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.jobs.cli.methods import build, target_of
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.prompts import model_folder, stop_ids
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer
from hasten.jobs.train.inputs import Reading, TrainingText, digest_of
from hasten.jobs.train.options import TrainConfig
from hasten.jobs.train.plots import plots
from hasten.jobs.train.ranks import check_ranks, ranks_session
from hasten.jobs.train.recorded import Recording
from hasten.jobs.train.training import HeadTraining, train_settings

_NOT_COMPARED = ("run_dir", "cache_folder", "tracking", "output", "overwrite", "threads", "address")
# They change neither the losses nor the checkpoints.
_MAY_DIFFER = ("train.checkpoint_seconds", "train.checkpoint_steps", "train.ranks", "train.zero")


class HeadFolder(ResumableFolder):
    """Folder of a trained head."""

    last_file = CONFIG


def run(config: TrainConfig) -> Path:
    """Train config.head for config.target; returns the path of report.json."""
    started = perf_counter()
    torch.set_num_threads(config.threads)
    head = build(config.head)
    if not isinstance(head, DraftHead):
        raise UserError(f"the head {type(head).__name__} drafts nothing: train it with hasten train_drafter")
    check_ranks(config, train_settings(config, 1))  # before anything is recorded
    if config.store not in head.stores:
        raise UserError(f"store={config.store} is wrong: {head.drafter} is stored in {' or '.join(head.stores)}")
    target = model_folder("target", config.target)
    facts = TargetFacts.of(target)
    drafter: Drafter = build({"_target_": target_of("drafter", head.drafter)})
    if config.initial:
        load_head(Path(config.initial), type(head), facts)
    texts = _texts(config, target, facts)
    output = Path(config.output) if config.output else Path(str(config.run_dir)) / "head"
    fingerprint = _fingerprint(config, facts, *texts)
    folder = HeadFolder(output, target)
    folder.check(fingerprint, config.overwrite)
    records = Path(config.data.records) if config.data.records else output / PROGRESS / "records"
    recordings = _recordings(config, records, _layers(config, head, facts), facts, *texts)

    with ranks_session(config, reads={"target": target}, writes={"output": output, "data.records": records}):
        run_dir = start(config)
        folder.open(fingerprint, config.overwrite)
        try:
            with tracked(config, "train", run_dir) as tracker:
                tracker.params(plain(config))
                training = HeadTraining(config, _setup(config, head, drafter, target, facts, recordings))
                report, usage = training.run(output / PROGRESS, tracker)
                training.save(output)
                if config.data.records is None:
                    shutil.rmtree(records, ignore_errors=True)
                usage.append({"cpu_seconds": cpu_seconds(), "peak_rss_bytes": peak_rss_bytes()})
                used = {
                    "seconds": perf_counter() - started,
                    "cpu_seconds": sum(process["cpu_seconds"] for process in usage),
                    "peak_rss_bytes": max(process["peak_rss_bytes"] for process in usage),
                }
                metrics = report["metrics"] | used
                common = {"job": "train", "config": plain(config), "layers": [], "output": str(output.absolute())}
                for plot in plots(report, run_dir):
                    tracker.figure(plot)
                path = tracker.report(common | report | {"metrics": metrics})
        finally:
            folder.release()
    before, after = metrics["untrained_acceptance_length"], metrics[SCORE]
    print(f"acceptance: {before:.2f} tokens a pass before training, {after:.2f} after it")
    option = "drafter.head" if drafter.reads_target else "draft"
    print(f"to use it: drafter={head.drafter} {option}={as_given(output.absolute())}")
    return path


def _setup(
    config: TrainConfig,
    head: DraftHead,
    drafter: Drafter,
    target: Path,
    facts: TargetFacts,
    recordings: tuple[Recording, Recording],
) -> HeadSetup:
    """What the training is made of, once the missing records are made."""
    recorded, held_records = _recorded(config, target, *recordings)
    held = config.held_out
    return HeadSetup(
        head,
        drafter,
        target.absolute(),
        facts,
        recorded.folder.absolute(),
        held_records.folder.absolute(),
        config.train.window,
        config.draft_vocabulary,
        1 if held.generate else held.prompt_length,
        held.budget,
        config.seed,
        config.store,
        Path(config.initial).absolute() if config.initial else None,
    )


def _recordings(
    config: TrainConfig,
    folder: Path,
    layers: tuple[int, ...],
    facts: TargetFacts,
    texts: list[TrainingText],
    held_out: list[TrainingText],
) -> tuple[Recording, Recording]:
    """Recordings of both kinds of sequences; UserError if the disk has no room for those to train on."""
    data, held = config.data, config.held_out

    def recording(name: str, of: list[TrainingText], settings: list[object], new_tokens: int) -> Recording:
        meta = RecordsMeta(layers, data.top, facts.hidden_size, facts.fingerprint, digest_of(of, settings))
        return Recording(folder / name, meta, of, data.shard, new_tokens)

    answers: list[object] = [data.max_new_tokens, data.temperature, data.seed]
    train = recording("train", texts, answers, data.max_new_tokens)
    train.check_space()
    return train, recording("held_out", held_out, [held.max_new_tokens], held.max_new_tokens)


def _recorded(config: TrainConfig, target: Path, train: Recording, held_out: Recording) -> tuple[Records, Records]:
    """The records of both, of which the missing ones are made; held-out prompts are answered greedily."""
    data, device = config.data, resolve_device(config.device)
    load = cache(partial(load_target, target, resolve_dtype(config.dtype, device), device))
    stop = _stop(config, target)
    return (
        train.run(load, "recording", stop, Sampling(data.temperature), data.seed, data.in_flight),
        held_out.run(load, "recording held-out", stop, Sampling(), 0, data.in_flight),
    )


def _layers(config: TrainConfig, head: DraftHead, facts: TargetFacts) -> tuple[int, ...]:
    # A draft model reads none, but a record of the target has one at least.
    layers = tuple(dict.fromkeys((*head.layers(facts), *config.data.layers))) or (FINAL,)
    wrong = [layer for layer in layers if not -1 <= layer <= facts.layers]
    if wrong:
        raise UserError(f"data.layers={wrong} is wrong: the target has hidden states 0 to {facts.layers}, and -1")
    return layers


def _texts(config: TrainConfig, target: Path, facts: TargetFacts) -> tuple[list[TrainingText], list[TrainingText]]:
    """Sequences to train on and to measure on."""
    data, held = config.data, config.held_out
    tokenizer = load_tokenizer(target, config.template)
    begin = begin_of(target, tokenizer, config.bos)
    common = tokenizer, facts.vocabulary, begin, data.sequence_length
    reading = Reading(*common, data.generate, data.prompt_length, data.seed)
    held_reading = Reading(*common, held.generate, held.prompt_length)
    if data.source == [LIBRARY]:
        texts = reading.library("train", data.sequences)
        own = held_reading.library("held_out", held.sequences)
    elif held.source:
        texts, own = reading.files("data.source", data.source, data.sequences), []
    else:
        count = data.sequences + held.sequences
        texts = reading.files("data.source", data.source, count)
        spared = held.sequences if len(texts) == count else max(1, min(held.sequences, len(texts) // 5))
        if len(texts) < 2:
            raise UserError(f"data.source={data.source} holds one sequence: none is left to measure on")
        # Read in the way of held-out sequences, the same places of the files.
        own = held_reading.files("data.source", data.source, len(texts))[-spared:]
        texts = texts[:-spared]
    if held.source:
        own = held_reading.files("held_out.source", held.source, held.sequences)
    limit = facts.max_length
    for new, option, of in ((data.max_new_tokens, "data", texts), (held.max_new_tokens, "held_out", own)):
        longest = max(len(text.tokens) + (text.learned is None) * new for text in of)
        if longest > limit:
            raise UserError(f"{option} has a sequence of {longest} tokens, and the target's context is {limit}")
    return texts, own


def _fingerprint(
    config: TrainConfig, facts: TargetFacts, texts: list[TrainingText], held_out: list[TrainingText]
) -> dict[str, object]:
    """Everything that determines the head."""
    settings: Record = {key: value for key, value in plain(config).items() if key not in _NOT_COMPARED}
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in ("records", "in_flight")}
    flat = {
        f"{key}.{name}": item
        for key, value in settings.items()
        if isinstance(value, dict)
        for name, item in value.items()
    }
    flat |= {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for name in _MAY_DIFFER:
        flat.pop(name)
    return flat | {"target": facts.fingerprint, "texts": digest_of(texts, []), "held_out": digest_of(held_out, [])}


def _stop(config: TrainConfig, target: Path) -> tuple[int, ...]:
    tokenizer = load_tokenizer(target, config.template)
    turn = end_of_turn(tokenizer)
    return tuple(sorted({*stop_ids(target, tokenizer), *(() if turn is None else (turn,))}))
