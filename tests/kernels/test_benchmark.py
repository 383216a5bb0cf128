"""The kernel benchmark: an op with wrong output is not timed, and a dry run without a GPU writes its reports."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.kernels.benchmark import all_cases, measure
from hasten.kernels.timing import Case, Skipped, check, rotation, time_calls

ROOT = Path(__file__).parents[2]


def run(*arguments, **variables):
    """The benchmark as `make gpu` runs it."""
    return subprocess.run(
        [sys.executable, "-m", "hasten.kernels.benchmark", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def double(kernel, nbytes=2**20):
    """A case of doubling a vector."""

    def operands(generator, device):
        return (torch.randn(256, generator=generator, device=device),)

    return Case("double", "256", "float32", "cpu", operands, kernel, lambda x: 2 * x, nbytes, 256)


def test_a_wrong_output_is_refused():
    check(double(lambda x: x + x), torch.device("cpu"))
    with pytest.raises(AssertionError):
        check(double(lambda x: 3 * x), torch.device("cpu"))


def test_inputs_are_random_differ_and_exceed_the_cache():
    case = double(torch.neg)
    buffers = rotation(case, torch.device("cpu"), dry=False)
    assert len(buffers) * case.nbytes > 2**26
    assert len({float(operands[0].sum()) for operands in buffers}) == len(buffers)
    assert all(bool(operands[0].any()) for operands in buffers)


def test_a_time_is_that_of_one_call_between_the_deciles():
    timing = time_calls(torch.neg, [(torch.ones(8),)] * 4, samples=5)
    assert 0 < timing.low <= timing.median <= timing.high < 0.1
    assert not timing.launch_bound


def test_peers_are_rows_and_a_peer_that_fails_is_reported():
    def fail(x):
        raise NotImplementedError("no such operator")

    case = replace(double(lambda x: x + x), peers={"torch.mul": lambda x: torch.mul(x, 2), "missing": fail})
    rows, skipped = measure(case, torch.device("cpu"), rate=1e9, dry=True)
    assert [row.implementation for row in rows] == ["kernel", "reference", "torch.mul"]
    assert [(peer.op, peer.reason) for peer in skipped] == [
        ("double", "missing at 256 float32: NotImplementedError: no such operator")
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would have the memory for operands")
def test_cases_of_a_gpu_are_listed_without_one_and_without_operands():
    listed = list(all_cases(torch.device("cuda"), dry=False))
    assert len(listed) > 50
    # Launch configurations are measured when a case is run: those behind a limit of time cost nothing.
    measured = {case.op for case in listed if not isinstance(case, Skipped) and case.prepare is not None}
    assert measured == {"packed_gemm", "float_gemm", "sign_gemm"}


@pytest.mark.slow
def test_a_trial_without_a_gpu_times_every_op_and_prints_its_table_last(tmp_path):
    done = run("--device", "cpu", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "kernels.json").read_text())
    ops = {path.parent.name for path in (ROOT / "kernels").glob("*/benchmark.py")}
    assert {row["op"] for row in report["rows"]} | {each["op"] for each in report["skipped"]} == ops
    assert {"device", "torch", "triton", "commit", "seed"} <= report["environment"].keys()
    assert report["wrong"] == []
    assert done.stdout.strip() == (tmp_path / "out" / "kernels.md").read_text().strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails():
    done = run()
    assert done.returncode == 2
    assert "torch finds no CUDA device" in done.stdout
