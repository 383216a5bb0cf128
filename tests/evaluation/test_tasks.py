import sys
from pathlib import Path

import pytest

from accel.errors import UserError
from accel.evaluation.tasks import check_names, run_tasks


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"tasks=\['piqa'\] needs .* pip install 'lm-eval\[hf\]'"):
        run_tasks(Path("model"), ["piqa"])


def test_no_tasks_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_tasks(Path("model"), []) == {}


def test_an_unknown_task_names_the_nearest() -> None:
    known = ["arc_easy", "arc_challenge", "piqa", "hellaswag"]
    check_names(["piqa", "arc_easy"], known)
    with pytest.raises(UserError, match="no task 'helaswag'; did you mean hellaswag"):
        check_names(["piqa", "helaswag"], known)
    with pytest.raises(UserError, match="no task 'zzz'; `lm-eval ls tasks` lists them"):
        check_names(["zzz"], known)
