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
sys.exit(pytest.main(["-n", "0", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "tests"]))
"""


@pytest.mark.slow
def test_gpu_checks_are_collected_without_ray_hydra_and_mlflow():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for module in ("test_kernels", "test_models", "test_calibration", "test_decoding", "test_evaluation"):
        assert f"tests/gpu/{module}.py" in done.stdout
    assert "tests/jobs" not in done.stdout
