"""A run's folder and tracker, made when work starts, so that a mistake in the options leaves no files behind."""

from pathlib import Path

from hasten.accel.errors import UserError
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.logs import log_to_folder
from hasten.jobs.common.reference import reference
from hasten.jobs.common.schema import Run, plain


def start(config: Run) -> Path:
    """Make config.run_dir with config.yaml and the log file in it, and return it.

    A job calls this once, after it has checked its options and inputs.
    """
    # `hasten bench NAME --help` must not wait for it.
    from omegaconf import OmegaConf

    folder = Path(str(config.run_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(config))), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    log_to_folder(folder)
    return folder


def tracked(config: Run, title: str, run_dir: Path) -> Tracker:
    """The run's Tracker as its options describe it; title: the job's, for the name of the MLflow run."""
    tracking = config.tracking
    return Tracker(
        tracking.uri,
        tracking.experiment,
        tracking.name or f"{title}-{run_dir.name}",
        run_dir,
        system_seconds=tracking.system_seconds,
        register=tracking.register,
        tags_of=lambda report: reference(report.get("config", plain(config)), report).tags,
    )
