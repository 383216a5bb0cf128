"""Every Triton kernel compiles for GPUs that are not here: nothing spills, shared memory suffices.

All launches are compiled for sm_90, and each for one of the other targets, in turn: of each op, all targets see some.
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
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be compiled")
    compilations = importlib.import_module(f"tests.kernels.ops.{op}").compilations()
    assert compilations
    for number, compilation in enumerate(compilations):
        if target in compilation.targets and target in (ALWAYS, OTHERS[number % len(OTHERS)]):
            try:
                check(compilation, target)
            except AssertionError as error:
                raise AssertionError(f"{compilation.name} on {target}: {error}") from None
