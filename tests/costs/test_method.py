"""Costs that methods state, and how a dry run names a method that states none."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, slab_weights
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.kinds.sparsity import SparsityLevel
from hasten.accel.compression.pruners.base import Pruner, Sparsity
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.costs.compression import estimate
from hasten.accel.costs.method import ROUNDED_BYTES, LayerStack, hessian_bytes
from hasten.accel.costs.solving import group_bytes, group_work, method_cost
from hasten.jobs.cli.main import main
from tests.costs.rates import RATES
from tests.costs.test_compression import planned

LEVELS = {"quantizer": Scheme(4, 32), "column_quantizer": ColumnBits(3.0), "pruner": Sparsity(0.5)}
CONF = Path(__file__).parents[2] / "conf"
CONFIGS = [(family, path) for family in LEVELS for path in sorted((CONF / family).glob("*.yaml"))]
LAYERS = LayerStack(rows=96, columns=64)


@dataclass(frozen=True)
class Unstated(Pruner):
    """A new pruner that does not state its cost."""

    def prepare(self, hessian):
        raise NotImplementedError

    def prune(self, weight, prepared, pattern, grid=None):
        raise NotImplementedError


@dataclass(frozen=True)
class UnstatedWithStatistics(Unstated):
    needs_hessian = True


@pytest.mark.parametrize(("family", "path"), CONFIGS, ids=lambda value: getattr(value, "stem", value))
def test_every_method_states_its_cost(family, path):
    method = instantiate(OmegaConf.load(path))
    cost = method.cost(LAYERS, LEVELS[family])
    more = method.cost(replace(LAYERS, rows=2 * LAYERS.rows), LEVELS[family])
    assert more.solve.elements > cost.solve.elements >= LAYERS.weights
    assert more.prepare == cost.prepare
    assert cost.weight_bytes >= ROUNDED_BYTES
    # A method that prepares something needs statistics.
    assert method.needs_hessian or cost.prepared_bytes == cost.prepare.exact_flops == 0


def test_rounding_to_nearest_is_worked_by_hand():
    scheme = Scheme(4, 32)
    weights = 96 * 64
    assert RoundToNearest().cost(LAYERS, scheme).solve.elements == 10 * weights
    assert RoundToNearest(search=20).cost(LAYERS, scheme).solve.elements == (10 + 9 * 20) * weights
    # Symmetric grids are searched with both signs, and the full range with the other one.
    symmetric = replace(scheme, symmetric=True)
    assert RoundToNearest(search=20).cost(LAYERS, symmetric).solve.elements == (10 + 9 * 41) * weights


def test_gptq_is_worked_by_hand():
    weights = 96 * 64
    plain = GPTQ(search=0, refits=0).cost(LAYERS, Scheme(4, 32))
    # Errors of finished columns, the output, and its error: a product of the weights with the factor each.
    assert plain.solve.exact_flops == 3 * weights * 64
    assert plain.prepared_bytes == 4 * 64 * 64
    assert plain.weight_bytes == SOLVE_BYTES
    # Two more products to fit scales, and two scales a row whose errors are looked at.
    fitted = GPTQ(search=0, refits=1).cost(LAYERS, Scheme(4, 32))
    assert fitted.solve.exact_flops == 5 * weights * 64
    assert fitted.solve.elements - plain.solve.elements == 6 * weights * 2


def test_wanda_factors_nothing_and_reads_the_hessian():
    cost = Wanda().cost(LAYERS, Sparsity(0.5))
    assert cost.prepare.seconds(RATES) == 0
    assert cost.prepared_bytes == hessian_bytes(64) == 4 * 64 * 64
    assert Wanda().cost(replace(LAYERS, gpu_memory=8 * 10**9), Sparsity(0.5)).prepared_bytes == 2 * hessian_bytes(64)


def test_what_a_method_prepares_is_counted_once_for_all_its_levels():
    method, other = GPTQ(), GPTQ(damping=0.1)
    four, three = GridLevel(Scheme(4, 32)), GridLevel(Scheme(3, 32))
    prepare = method.cost(LAYERS, four.scheme).prepare
    both = group_work(LAYERS, [(method, four), (method, three)])
    assert both.exact_flops == pytest.approx(
        prepare.exact_flops + 2 * method.cost(LAYERS, four.scheme).solve.exact_flops, rel=1e-12
    )
    apart = group_work(LAYERS, [(method, four), (other, three)])
    assert apart.exact_flops - both.exact_flops == pytest.approx(prepare.exact_flops)


def test_memory_is_that_of_the_method_that_takes_most():
    level = GridLevel(Scheme(4, 32))
    rounding, solving = (RoundToNearest(), level), (GPTQ(), level)
    assert group_bytes(LAYERS, [rounding]) == {"slab of weights": ROUNDED_BYTES * 96 * 64}
    both = {"slab of weights": SOLVE_BYTES * 96 * 64, "factor": 4 * 64 * 64}
    assert group_bytes(LAYERS, [rounding, solving]) == group_bytes(LAYERS, [solving]) == both
    large = LayerStack(1 << 14, 1 << 12)
    assert group_bytes(large, [rounding])["slab of weights"] == ROUNDED_BYTES * slab_weights()
    assert large.slabs == 16


def test_a_plan_names_the_methods_that_state_no_cost(model):
    levels = [SparsityLevel(Sparsity(0.5)), SparsityLevel(Sparsity(0.25))]
    found = estimate(planned(model, methods=[Unstated()], levels=levels, sequences=0), RATES)
    assert found.notes == ("guess: Unstated states no cost",)
    labels = {step.name: step.label for step in found.steps}
    assert labels.pop("solve") == "solve (guess: Unstated states no cost)"
    assert all(name == label for name, label in labels.items())
    stated = estimate(planned(model), RATES)
    assert stated.notes == ()
    assert all(step.name == step.label for step in stated.steps)


def test_a_guess_is_rounding_or_a_visit_of_all_columns():
    plain = method_cost(LAYERS, Unstated(), SparsityLevel(Sparsity(0.5)))
    assert plain == RoundToNearest().cost(LAYERS, Scheme(4, 32))
    with_hessian = method_cost(LAYERS, UnstatedWithStatistics(), SparsityLevel(Sparsity(0.5)))
    assert with_hessian == GPTQ(search=0, refits=0).cost(LAYERS, Scheme(4, 32))


def test_the_report_and_the_table_of_a_dry_run_say_what_is_guessed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hasten.cluster.runtime.rates.measure", lambda *_: RATES)
    monkeypatch.setattr(GPTQ, "cost", lambda *_: None)
    assert main(["plan", "compress", "plan.memory=8GB"]) == 0
    printed = capsys.readouterr()
    assert "solve (guess: GPTQ states no cost)" in printed.out
    assert "note: guess: GPTQ states no cost" in printed.out
    report = json.loads(Path(printed.out.splitlines()[-1].removeprefix("report: ")).read_text())
    assert report["plan"]["notes"] == ["guess: GPTQ states no cost"]
    assert "solve" in {step["step"] for step in report["plan"]["steps"]}
