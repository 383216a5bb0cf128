"""C kernels compiled as for processors that have fewer instructions than this one."""

import platform
from types import ModuleType
from typing import Protocol

import pytest

from hasten.kernels import compiled


class Compile(Protocol):
    """Compiles the source of a C kernel's module again, which then calls that."""

    def __call__(self, c_kernel: ModuleType) -> None:
        """Skips the test where there is no compiler that knows the options."""


@pytest.fixture(params=["-mno-avx", "-mno-avx512f", "-mno-avx512bf16"])
def with_fewer_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Switches instructions of x86 off."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("switches instructions of x86 off")
    monkeypatch.setenv("CC", f"cc {request.param}")

    def compile_again(c_kernel: ModuleType) -> None:
        monkeypatch.setattr(c_kernel, "load_library", compiled.load_library.__wrapped__)
        library = c_kernel._library.__wrapped__()
        if library is None:
            pytest.skip(f"there is no C compiler that knows {request.param}")
        monkeypatch.setattr(c_kernel, "_library", lambda: library)

    return compile_again
