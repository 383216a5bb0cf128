"""Every Triton kernel compiles for GPUs that are not here: nothing spills, shared memory suffices.

All launches are compiled for sm_90, and each for one of the other targets, in turn; `make soak` compiles all for all.
"""

import importlib
import os

import pytest

from tests.kernels.ops import OPS
from tests.kernels.ops.compilation import TARGETS, check

pytestmark = pytest.mark.slow
ALWAYS = "sm_90"
OTHERS = [target for target in TARGETS if target != ALWAYS]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills_and_within_shared_memory(op, target):
    compile_all(op, target, lambda number: target in (ALWAYS, OTHERS[number % len(OTHERS)]))


@pytest.mark.soak
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("op", OPS)
def test_every_launch_compiles_for_every_gpu(op, target):
    compile_all(op, target, lambda number: True)


def compile_all(op, target, chosen):
    """Compile the launches of an op whose numbers are chosen."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be compiled")
    compilations = importlib.import_module(f"tests.kernels.ops.{op}").compilations()
    assert compilations
    for number, compilation in enumerate(compilations):
        if target in compilation.targets and chosen(number):
            try:
                check(compilation, target)
            except AssertionError as error:
                raise AssertionError(f"{compilation.name} on {target}: {error}") from None
