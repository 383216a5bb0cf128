import pytest

from hasten.accel.errors import UserError
from hasten.accel.evaluation.gates import Gate, layer_kind, mean_errors, task_changes


@pytest.mark.parametrize(
    ("text", "metrics", "value", "holds"),
    [
        ("kl<0.05", {"kl_divergence": 0.04}, 0.04, True),
        ("kl<0.05", {"kl_divergence": 0.05}, 0.05, False),
        ("kl <= 5e-2", {"kl_divergence": 0.05}, 0.05, True),
        ("top1>0.9", {"top1_agreement": 0.8}, 0.8, False),
        ("bytes>=10", {"bytes": 10}, 10, True),
        ("kl<0.05", {"kl_divergence": float("nan")}, float("nan"), False),
        ("task:arc-easy>=0", {"arc-easy.acc_change": 0.0}, 0.0, True),
        ("task:arc_easy>-0.01", {"arc_easy.acc": 0.4, "arc_easy.acc_change": -0.02}, -0.02, False),
        ("task:arc_easy.acc_norm>-0.01", {"arc_easy.acc_change": -1.0, "arc_easy.acc_norm_change": 0.0}, 0.0, True),
    ],
)
def test_a_gate_holds_where_its_metric_keeps_the_limit(text, metrics, value, holds):
    gate = Gate.parse(text)
    assert gate.value(metrics) == pytest.approx(value, nan_ok=True)
    assert gate.holds(gate.value(metrics)) is holds


@pytest.mark.parametrize("text", ["kl", "kl=0.05", "kl<", "kl<low", "kl<1.2.3", "<0.05", "task:>1", "kl<0.1,top1>1"])
def test_other_texts_are_refused_with_the_form(text):
    with pytest.raises(UserError, match=r"is wrong: expected a metric, a relation and a number, like kl<0\.05"):
        Gate.parse(text)


def test_a_metric_that_was_not_measured_is_named_with_those_that_were():
    with pytest.raises(UserError, match=r"gate=kk<1 needs kk, which was not measured: there are bits, perplexity"):
        Gate.parse("kk<1").value({"perplexity": 3.0, "bits": 4, "kl_divergence": None})


def test_changes_are_those_of_metrics_that_both_have():
    changes = task_changes({"t.acc": 0.5, "t.acc_stderr": 0.1, "u.acc": 1.0}, {"t.acc": 0.75, "t.acc_stderr": 0.1})
    assert changes == {"t.acc_change": -0.25}


def test_kinds_of_layers_are_ordered_by_their_mean_error():
    rows = [
        {"layer": "model.layers.0.mlp.experts.3.down_proj", "error": 0.1},
        {"layer": "model.layers.1.mlp.experts.0.down_proj", "error": 0.3},
        {"layer": "model.layers.0.self_attn.q_proj", "error": 0.25},
        {"layer": "lm_head", "error": None},
    ]
    assert list(mean_errors(rows).items()) == [
        ("self_attn.q_proj", 0.25),
        ("mlp.experts.down_proj", pytest.approx(0.2)),
    ]
    assert layer_kind("lm_head") == "lm_head"
