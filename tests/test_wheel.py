"""The wheel, installed where nothing else of the project is: its packages come from this environment by a .pth file."""

import json
import os
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
    folder = tmp_path_factory.mktemp("wheel")
    check_output(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", folder, ROOT),
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
    sources = {installed_name(path) for path in (ROOT / "kernels").rglob("*.c")}
    assert sources
    assert configs | models | pages | sources <= names
    for model in ("target", "draft"):
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
