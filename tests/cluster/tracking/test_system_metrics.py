"""Samples of the machine's use under MLflow's names."""

import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hasten.cluster.tracking.system_metrics import SystemMetrics, gpus, parsed

ALWAYS = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/disk_usage_percentage",
    "system/network_transmit_megabytes",
    "system/network_receive_megabytes",
}


def test_samples_come_with_their_step_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hasten.cluster.tracking.system_metrics.gpus", lambda: {"system/gpu_0_utilization_percentage": 5.0}
    )
    enough = threading.Event()
    samples: list[tuple[Mapping[str, float], int]] = []

    def log(values: Mapping[str, float], step: int) -> None:
        samples.append((values, step))
        if step == 2:
            enough.set()

    before = set(threading.enumerate())
    metrics = SystemMetrics(0.001, log, tmp_path)
    assert enough.wait(60)
    metrics.stop()
    assert set(threading.enumerate()) == before
    assert [step for _, step in samples] == list(range(len(samples)))
    for values, _ in samples:
        assert set(values) == ALWAYS | {"system/gpu_0_utilization_percentage"}
        assert 0 < values["system/system_memory_usage_percentage"] <= 100
        assert 0 <= values["system/disk_usage_percentage"] <= 100


def test_it_stops_without_waiting_for_the_next_sample(tmp_path: Path) -> None:
    metrics = SystemMetrics(3600, pytest.fail, tmp_path)
    metrics.stop()
    assert not metrics._thread.is_alive()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "35, 1000, 4000\n0, 0, 80000\n",
            {
                "system/gpu_0_utilization_percentage": 35.0,
                "system/gpu_0_memory_usage_megabytes": 1048.576,
                "system/gpu_0_memory_usage_percentage": 25.0,
                "system/gpu_1_utilization_percentage": 0.0,
                "system/gpu_1_memory_usage_megabytes": 0.0,
                "system/gpu_1_memory_usage_percentage": 0.0,
            },
        ),
        (
            "[N/A], 1000, 4000\n",
            {"system/gpu_0_memory_usage_megabytes": 1048.576, "system/gpu_0_memory_usage_percentage": 25.0},
        ),
        ("7, [N/A], [N/A]\n[N/A], [N/A], [N/A]\n", {"system/gpu_0_utilization_percentage": 7.0}),
        ("[N/A], 5, 0\n", {"system/gpu_0_memory_usage_megabytes": 5.24288}),
        ("No devices were found\n", {}),
        ("", {}),
    ],
)
def test_of_a_gpu_is_kept_what_nvidia_smi_tells(text: str, expected: dict[str, float]) -> None:
    assert parsed(text) == pytest.approx(expected)
    assert parsed(text).keys() == expected.keys()


def test_nvidia_smi_is_asked_in_the_order_that_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\n[ "$1" = --query-gpu=utilization.gpu,memory.used,memory.total ] && echo "1, 2, 4"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus()["system/gpu_0_utilization_percentage"] == 1.0
    assert gpus()["system/gpu_0_memory_usage_percentage"] == 50.0
    command.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == {}


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError(13, "no")])
def test_a_broken_nvidia_smi_costs_its_figures_only(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", fails)
    assert gpus() == {}
