"""Sums of x xᵀ in panels, by C that is compiled here, and by torch."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hasten.kernels import compiled, second_moment
from hasten.kernels.second_moment import c_kernel, reference

SIZES = [(1, 1), (1, 40), (2, 31), (255, 32), (256, 33), (257, 100), (600, 200), (513, 300)]
DTYPES = [torch.float32, torch.bfloat16]
# Instruction sets for which compilers make different code of the kernel.
OPTIONS = [["-mno-avx"], ["-mavx2", "-mfma", "-mno-avx512f"], ["-mavx512f", "-mno-avx512bf16"], ["-march=native"]]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(tokens, columns, dtype):
    generator = torch.Generator().manual_seed(tokens * columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def empty(columns, width):
    return torch.zeros(sum((stop - start) * stop for start, stop in second_moment.panel_bounds(columns, width)))


def check(sums, x, width, begin=0.0):
    exact = begin + x.double().T @ x.double()
    bounds = second_moment.panel_bounds(x.shape[1], width)
    for (start, stop), panel in zip(bounds, second_moment.panels(sums, x.shape[1], width), strict=True):
        torch.testing.assert_close(panel.double(), exact[start:stop, :stop], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [32, 128, 256])
def test_both_sum_the_products_of_all_pairs_of_columns(size, dtype, width):
    x = inputs(*size, dtype)
    for add in (second_moment.add, reference.add):
        sums = empty(size[1], width)
        add(sums, x, width)
        check(sums, x, width)
        # A second call adds to what is there.
        add(sums, x, width)
        check(sums / 2, x, width)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_is_right_on_every_instruction_set_that_runs_here(options, tmp_path):
    library = compile_with(options, tmp_path)
    for tokens, columns in SIZES:
        for dtype, function in zip(
            DTYPES, (library.second_moment_float32, library.second_moment_bfloat16), strict=True
        ):
            if dtype == torch.bfloat16 and not library.second_moment_abilities() & 2:
                continue
            x, sums = inputs(tokens, columns, dtype), empty(columns, 128)
            function.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 3, ctypes.c_void_p, ctypes.c_int]
            assert function(x.data_ptr(), tokens, columns, 128, sums.data_ptr(), 1) == 0
            check(sums, x, 128)


def compile_with(options, folder):
    compiler, flags = shutil.which("cc"), Path("/proc/cpuinfo")
    if compiler is None or not flags.is_file():
        pytest.skip("there is no C compiler, or it is not known what the processor can")
    words = flags.read_text().split()
    for option in options:
        name = option.removeprefix("-m")
        if not name.startswith(("no-", "arch=")) and name not in words:
            pytest.skip(f"the processor has no {name}")
    path = folder / "kernel.so"
    command = [
        compiler,
        "-O2",
        *options,
        "-fopenmp",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror",
        str(c_kernel.SOURCE),
        "-o",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and "-m" in result.stderr and "unrecognized" in result.stderr:
        pytest.skip("the compiler is of another architecture")
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(path))


def test_sums_are_the_same_to_the_bit_on_any_threads(threads):
    x = inputs(700, 200, torch.bfloat16)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(empty(200, 128))
        second_moment.add(found[-1], x, 128)
    assert all(torch.equal(one, found[0]) for one in found)


def test_without_a_compiler_torch_sums(monkeypatch):
    x, sums = inputs(60, 40, torch.bfloat16), empty(40, 32)
    monkeypatch.setattr(c_kernel, "load_library", lambda source: None)
    c_kernel._library.cache_clear()
    assert not c_kernel.is_faster(torch.float32)
    second_moment.add(sums, x, 32)
    c_kernel._library.cache_clear()
    check(sums, x, 32)


def test_the_kernel_is_used_where_it_is_faster():
    if compiled.load_library(c_kernel.SOURCE) is None:
        pytest.skip("there is no C compiler")
    abilities = c_kernel._library().second_moment_abilities()
    assert c_kernel.is_faster(torch.float32) == bool(abilities & 1)
    if not torch.cpu._is_amx_tile_supported():
        assert c_kernel.is_faster(torch.bfloat16) == bool(abilities)
