"""The comparison of the kernel with torch, with a clock that is not one."""

import pytest
import torch

from hasten.kernels.skinny_gemm import c_kernel, choice

FASTER, SLOWER = 0.5, 1.2


class Clock:
    """Each call of the kernel takes `ratio` seconds and each of torch.mm one; every third call is disturbed."""

    def __init__(self, monkeypatch, ratio):
        self.now, self.calls, self.threads = 0.0, 0, set()
        mm = torch.mm
        monkeypatch.setattr(c_kernel, "skinny_gemm", lambda x, packed, outputs: self.spend(ratio))
        monkeypatch.setattr(torch, "mm", lambda x, y: self.spend(1.0) if y.shape == (1024, 1024) else mm(x, y))

    def spend(self, seconds):
        self.calls += 1
        self.threads.add(torch.get_num_threads())
        self.now += seconds + (7.0 if self.calls % 3 == 0 else 0.0)

    def __call__(self):
        return self.now


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_the_fastest_calls_are_compared_with_one_thread(monkeypatch, ratio):
    before = torch.get_num_threads()
    clock = Clock(monkeypatch, ratio)
    assert choice.ratio(clock) == pytest.approx(ratio)
    assert clock.threads == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("ratio", "kernel"), [(FASTER, True), (1.0, True), (1.05, True), (SLOWER, False)])
def test_torch_is_chosen_if_it_is_clearly_faster(monkeypatch, tmp_path, ratio, kernel):
    assert choice._decide(tmp_path / "choice", Clock(monkeypatch, ratio)) is kernel


def test_the_first_choice_on_a_machine_holds(monkeypatch, tmp_path):
    path = tmp_path / "choice"
    assert not choice._decide(path, Clock(monkeypatch, SLOWER))
    clock = Clock(monkeypatch, FASTER)
    assert not choice._decide(path, clock)
    assert clock.calls == 0
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_processes_that_measure_at_once_the_first_to_write_decides(monkeypatch, tmp_path):
    path = tmp_path / "choice"
    clock = Clock(monkeypatch, FASTER)

    def other_process():
        path.write_text("torch\n")
        return clock()

    assert not choice._decide(path, other_process)
    assert clock.calls


def test_without_a_folder_to_write_to_each_process_measures(monkeypatch, tmp_path):
    path = tmp_path / "none" / "choice"
    assert choice._decide(path, Clock(monkeypatch, FASTER))
    assert not choice._decide(path, Clock(monkeypatch, SLOWER))


def test_the_choice_depends_on_the_instructions_that_torch_uses(monkeypatch):
    if not c_kernel.is_available():
        pytest.skip("there is no C compiler")
    paths = []
    monkeypatch.setattr(choice, "_decide", lambda path, clock: paths.append(path))
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        choice.is_faster.__wrapped__()
    assert paths[0].parent == paths[1].parent
    assert paths[0] != paths[1]
