"""The GPU checks are collected where only torch, transformers, triton and pytest are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("ray", "hydra", "omegaconf", "mlflow", "deepspeed", "compressed_tensors", "scipy", "optuna", "matplotlib")
COLLECT = f"""
import sys
for name in {FORBIDDEN}:
    sys.modules[name] = None  # importing it raises ImportError
import pytest
plugins = ["-p", "xdist.plugin", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*plugins, "-n", "0", "-q", "--collect-only", "-m", "gpu", "tests"]))
"""


@pytest.mark.slow
def test_gpu_checks_are_collected_without_ray_hydra_and_mlflow():
    # Hydra brings a plugin for pytest.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for module in ("test_kernels", "test_models", "test_calibration", "test_decoding", "test_evaluation"):
        assert f"tests/gpu/{module}.py" in done.stdout
    assert "tests/jobs" not in done.stdout
