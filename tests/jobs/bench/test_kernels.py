"""`hasten bench kernels`."""

import json
from itertools import islice

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.jobs.bench import kernels
from hasten.kernels import benchmark


def test_c_kernels_are_timed_beside_their_references_and_triton_kernels_are_listed_as_missing(tmp_path, monkeypatch):
    # One case of each op, and the smallest number of samples: the full table takes minutes.
    cases = list(islice(benchmark.all_cases(torch.device("cuda"), dry=False, ops=["skinny_gemm", "dequantize"]), 2))
    monkeypatch.setattr(benchmark, "all_cases", lambda *arguments: iter(cases))
    monkeypatch.setattr(benchmark, "copy_rate", lambda device, dry: 1e9)
    monkeypatch.setattr(benchmark, "SAMPLES", 2)
    threads = torch.get_num_threads()
    document = tmp_path / "table.md"
    config = kernels.Config(document=str(document), run_dir=str(tmp_path / "run"))
    try:
        report = json.loads(kernels.run(config).read_text())
    finally:
        torch.set_num_threads(threads)
    text = document.read_text()
    assert text.count("| skinny_gemm | kernel |") == text.count("| skinny_gemm | reference |") == 1
    assert report["metrics"]["cases"] == 1
    assert report["metrics"]["wrong"] == 0
    assert report["metrics"]["skinny_gemm_copy_share"] > 0
    if not torch.cuda.is_available():
        assert text.count("not measured: dequantize, its Triton kernels need a GPU") == 1


def test_an_unknown_op_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"ops=gemm is none of .*dequantize"):
        kernels.run(kernels.Config(ops=["gemm"]))


def test_when_the_time_is_over_the_remaining_cases_are_listed():
    results = benchmark.run(torch.device("cpu"), ops=["skinny_gemm"], seconds=-1)
    assert results.rows == []
    assert all(case.reason == "the run's -1 seconds were over" for case in results.skipped)
    assert len(results.skipped) > 1


def test_every_op_is_measured_before_the_second_case_of_any():
    ops = ["dequantize", "skinny_gemm"]
    cases = list(benchmark.all_cases(torch.device("cuda"), dry=False, ops=ops))
    assert [case.op for case in cases[:4]] == ops * 2
