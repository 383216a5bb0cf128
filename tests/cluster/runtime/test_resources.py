import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from hasten.cluster.runtime import resources


def test_peak_memory_covers_what_was_held_and_given_back() -> None:
    before = resources.peak_rss_bytes()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    del held
    after = resources.peak_rss_bytes()
    assert after >= before
    assert 64 * 2**20 < after < 2**40
    assert resources.peak_rss_bytes() >= after


def shared_bytes() -> int:
    """Shared memory in this process's resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_pages_of_the_object_store_go_back_and_are_read_again_where_needed(ray_session: None) -> None:
    resources.release_memory()
    before = shared_bytes()
    found = ray.get(ray.put(np.arange(12_000_000)))
    assert shared_bytes() > before + 90e6
    resources.release_memory()
    assert shared_bytes() < before + 1e6
    assert np.array_equal(found, np.arange(12_000_000))
    # The sum has read 96 MB again.
    assert found.sum() == 12_000_000 * 11_999_999 // 2
    resources.release_memory()
    held = shared_bytes()
    few = ray.get(ray.put(np.arange(2_000_000)))
    resources.release_memory()
    # 16 MB are not worth the time in which they are cleared and mapped again.
    assert shared_bytes() > held + 15e6
    assert few[-1] == 1_999_999


def test_cpu_seconds_grow_with_work() -> None:
    before = resources.cpu_seconds()
    while resources.cpu_seconds() == before:
        sum(range(10000))
    assert resources.cpu_seconds() > before


def test_the_machine_is_described() -> None:
    found = resources.machine()
    assert list(found) == ["host", "platform", "python", "cpu", "cores", "memory_bytes", "gpus"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["cpu"]


def test_gpu_names_are_what_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.shutil, "which", lambda _: "nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200\nNVIDIA H200\n")
    monkeypatch.setattr(resources.subprocess, "run", lambda *_, **__: answer)
    assert resources.gpu_names() == ["NVIDIA H200", "NVIDIA H200"]


@pytest.mark.parametrize("error", [OSError(), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_a_machine_whose_nvidia_smi_fails_has_no_gpus(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(resources.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(resources.subprocess, "run", fail)
    assert resources.gpu_names() == []


def test_the_commit_is_that_of_this_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(folder: Path, *arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "checkout" / "cluster"
    package.mkdir(parents=True)
    code = package / "resources.py"
    code.write_text("one")
    monkeypatch.setattr(resources, "_ROOT", package.parent)
    assert resources.git_commit() is None
    git(package.parent, "init", "-q")
    assert resources.git_commit() is None  # no commit yet
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "one")
    commit = git(package.parent, "rev-parse", "HEAD")
    assert resources.git_commit() == commit
    code.write_text("two")
    assert resources.git_commit() == f"{commit}-dirty"
    # Installed below somebody else's checkout: that one's commit says nothing about this code.
    inside = package.parent / "site-packages" / "cluster"
    inside.mkdir(parents=True)
    monkeypatch.setattr(resources, "_ROOT", inside.parent)
    assert resources.git_commit() is None


@pytest.mark.parametrize(
    ("description", "fast"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2", False),
    ],
)
def test_bfloat16_is_fast_with_matrix_units_and_with_vectors_of_amd(
    description: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: description)
    assert resources.has_fast_bfloat16() is fast
