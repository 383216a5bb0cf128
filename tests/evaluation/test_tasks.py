import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hasten.accel.errors import UserError
from hasten.accel.evaluation.tasks import check_names, run_tasks


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the calls of a fake lm-eval, which knows two tasks; one of them needs the network."""
    asked: dict[str, Any] = {}

    def simple_evaluate(model: Any, tasks: list[str], **named: Any) -> dict[str, Any]:
        if "far" in tasks:
            raise ConnectionError("no hub\nhere")
        asked.update(model=model, tasks=tasks, **named)
        # The forms that lm-eval 0.4.13 returned.
        return {"results": {"near": {"alias": "near", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1}}}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": ModuleType("models"),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **named: named),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["near", "far"])),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_metrics_come_back_as_numbers_by_task(asked: dict[str, Any]) -> None:
    assert run_tasks(Path("model"), ["near"], limit=3) == {"near": {"acc": 0.5, "acc_stderr": 0.1, "em_strict": 1.0}}
    assert asked["model"]["pretrained"] == "model"
    assert asked["tasks"] == ["near"]
    assert asked["limit"] == 3


def test_a_task_whose_data_is_unavailable_is_a_one_line_error(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"tasks=\['far'\] could not be run: no hub$"):
        run_tasks(Path("model"), ["far"])
