"""What all tests share: one thread, and one Ray for the whole session, started when the first test asks for it."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before torch is imported: threads that wait for each other on a busy machine make tests take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests start hundreds of processes, Ray's workers among them. Without bytecode on disk, each of them would compile all
# modules that it imports, which takes half as long again as the import itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


# Folders whose tests import nothing but accel and kernels.
_GPU_FOLDERS = ("gpu", "kernels")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, only collect what a GPU machine can import, which need not have Ray, Hydra or MLflow."""
    if config.option.markexpr != "gpu" or collection_path.parent != Path(__file__).parent:
        return None
    return collection_path.name not in _GPU_FOLDERS or None


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the session's Ray is marked `ray`.

    Files with long tests come first, then contracts, whose many tests take a minute; the others fill the rest.
    """
    long = set()
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        if any(item.get_closest_marker(name) for name in ("ray", "slow", "faults")):
            long.add(item.path)
    items.sort(key=lambda item: 0 if item.path in long else 1 if "contract" in item.path.name else 2)


def pytest_collection_finish() -> None:
    """Modules and thousands of tests stay to the end: looking at them would take 0.4 s of every full collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Extensions that look for leaks as Python ends count what is frozen."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables, which take seconds to make."""
    # Imported here because this file is read on GPU machines without MLflow, too.
    from hasten.cluster.tracking import store

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store.import_mlflow()
    store.make_database(file)
    return file


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    # Imported here because this file is read on GPU machines without Ray, too.
    from hasten.cluster.runtime.session import session

    with session(None, cpus=4):
        yield


@pytest.fixture(scope="session")
def deepspeed() -> None:
    """Skips tests of process groups where DeepSpeed is not installed; it is not imported here, which takes seconds."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'hasten[distributed]'")


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Gradients are back after each test: an actor made without Ray switches them off in the tests' own process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)
