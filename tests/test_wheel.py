"""The wheel, installed where nothing else of the project is: its packages come from this environment by a .pth file."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def check_output(*command, cwd):
    """Standard output of a command that must succeed, run without this environment's variables for Python."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy: setuptools leaves a folder `build` whose old files would get into later wheels."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("accel", "cluster", "conf", "hasten", "jobs", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "source")
    check_output(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", folder, folder / "source"),
        cwd=folder,
    )
    [found] = folder.glob("hasten-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the commands of a new environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    check_output(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    check_output(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder.parent)
    # Folders named in a .pth file are put on the path, but the .pth files in them are not read: this environment's own
    # editable installation of hasten stays out.
    packages = check_output(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    Path(packages.strip(), "borrowed.pth").write_text("\n".join(sorted(paths)) + "\n")
    return python.parent


def installed_name(path):
    """Name in the wheel of a file of the checkout."""
    return f"hasten/{path.relative_to(ROOT).as_posix()}"


def test_the_wheel_holds_every_config_and_the_embedded_models(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {installed_name(path) for path in (ROOT / "conf").rglob("*.yaml")}
    models = {
        installed_name(path)
        for path in (ROOT / "accel" / "models" / "embedded").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    pages = {installed_name(path) for path in (ROOT / "jobs" / "report").glob("page.*")}
    assert "hasten/jobs/report/page.html.jinja" in pages
    assert "hasten/jobs/bench/prompts/chat.jsonl" in names
    sources = {installed_name(path) for kind in "ch" for path in (ROOT / "kernels").rglob(f"*.{kind}")}
    assert sources
    assert configs | models | pages | sources <= names
    for model in ("target", "draft", "recall"):
        assert f"hasten/accel/models/embedded/{model}/model.safetensors" in names


def test_the_wheel_holds_no_tests_and_no_runs(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hasten"}
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/tests/" in name or "__pycache__" in name]


def test_the_installed_command_shows_its_help_from_any_folder(installed, tmp_path):
    out = check_output(installed / "hasten", "compress", "--help", cwd=tmp_path)
    assert "quantizer=gptq" in out
    where = check_output(installed / "python", "-c", "import hasten.jobs; print(hasten.jobs.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_installed_command_compresses_the_embedded_model(installed, tmp_path):
    out = check_output(
        *(installed / "hasten", "compress", "output=compressed", "workers=1"),
        *("calibration.sequences=2", "calibration.sequence_length=64"),
        *("evaluation.sequences=1", "evaluation.sequence_length=64", "evaluation.stride=64"),
        cwd=tmp_path,
    )
    last = out.splitlines()[-1]
    assert last.startswith("report: ")
    report = json.loads((tmp_path / last.removeprefix("report: ")).read_text())
    assert report["job"] == "compress"
    settings = json.loads((tmp_path / "compressed" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"


@pytest.fixture
def beside_kernels(installed):
    """The same environment with Hugging Face's `kernels` from the registry, which transformers imports where it is."""
    command = [sys.executable, "-m", "pip", "--python", str(installed / "python"), "install", "--quiet", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no registry of packages can be reached: {done.stderr.strip().splitlines()[-1]}")
    return installed


# Reads a file of each, so that an overwritten one shows.
BOTH = """
import importlib.metadata, kernels
print(kernels.__file__)
files = [file for file in importlib.metadata.files("kernels") if file.hash is not None]
import base64, hashlib
for file in files:
    digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
print(len(files))
"""


@pytest.mark.soak
def test_hugging_faces_kernels_and_ours_live_beside_each_other(beside_kernels, wheel, tmp_path):
    theirs = check_output(beside_kernels / "python", "-c", BOTH, cwd=tmp_path)
    where = "import hasten.kernels, kernels, sys; print(hasten.kernels.__file__); assert hasten.kernels is not kernels"
    ours = Path(check_output(beside_kernels / "python", "-c", where, cwd=tmp_path).strip())
    assert ours.parts[-3:] == ("hasten", "kernels", "__init__.py")
    # A job runs with both, and so does the module of transformers that imports theirs.
    words = ("replay", "drafter=prompt_lookup", "budgets=[8]", "sequences=1")
    out = check_output(beside_kernels / "hasten", *words, cwd=tmp_path)
    assert out.splitlines()[-1].startswith("report: ")
    check_output(beside_kernels / "python", "-c", "import transformers.integrations.hub_kernels", cwd=tmp_path)

    pip = (sys.executable, "-m", "pip", "--python", beside_kernels / "python")
    check_output(*pip, "uninstall", "--yes", "hasten", cwd=tmp_path)
    assert not ours.parents[1].exists()
    assert check_output(beside_kernels / "python", "-c", BOTH, cwd=tmp_path) == theirs

    check_output(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    check_output(*pip, "uninstall", "--yes", "kernels", cwd=tmp_path)
    check_output(beside_kernels / "hasten", "compress", "--help", cwd=tmp_path)
    gone = "import importlib.util, hasten.kernels; assert importlib.util.find_spec('kernels') is None"
    check_output(beside_kernels / "python", "-c", gone, cwd=tmp_path)
