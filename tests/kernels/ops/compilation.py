"""Compiles Triton kernels ahead of time for GPUs that are not here, and looks at the result."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Shared memory of a thread block that consumer GPUs have, too; local memory of an AMD GPU.
MAX_SHARED_BYTES = {"cuda": 99 * 1024, "hip": 64 * 1024}
_MATRIX_INSTRUCTIONS = {"cuda": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", "hip": r"\bv_mfma"}


@dataclass(frozen=True)
class Compilation:
    """One kernel with the types and constants of one launch.

    signature: Triton type of each argument in order, `constexpr` among them; pointers are aligned to 16 bytes. options:
    num_warps and num_stages. tensor_cores: whether matrix instructions must appear. targets: names of TARGETS. aligned:
    integer arguments that are multiples of 16, on which the width of loads depends.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    tensor_cores: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    aligned: tuple[str, ...] = ()


def check(compilation: Compilation, target: str) -> None:
    """AssertionError if registers spill, shared memory does not suffice, or matrix instructions are missing."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = TARGETS[target][0]
    pointers = [
        (number,)
        for number, (name, kind) in enumerate(compilation.signature.items())
        if kind.startswith("*") or name in compilation.aligned
    ]
    source = ASTSource(
        compilation.kernel,
        compilation.signature,
        constexprs=compilation.constants,
        attrs={pointer: [["tt.divisibility", 16]] for pointer in pointers},
    )
    compiled = compile_kernel(source, target=GPUTarget(*TARGETS[target]), options=compilation.options)
    assembly = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    assert compiled.metadata.shared <= MAX_SHARED_BYTES[backend], f"{compiled.metadata.shared} bytes of shared memory"
    spilled = _spilled_by_ptxas(assembly) if backend == "cuda" else _spilled_on_amd(assembly)
    assert not spilled, f"spills: {spilled}"
    if compilation.tensor_cores:
        assert re.search(_MATRIX_INSTRUCTIONS[backend], assembly), "no matrix instructions"


def _spilled_by_ptxas(assembly: str) -> list[str]:
    """What ptxas says about spilled bytes; empty if there are none."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    capability = re.search(r"\.target (sm_\w+)", assembly)
    assert capability is not None
    with tempfile.TemporaryDirectory() as workspace:
        source = Path(workspace, "kernel.ptx")
        source.write_text(assembly)
        # The newest of the bundled assemblers knows every version of PTX that Triton writes.
        command = [
            folder / "ptxas-blackwell",
            "-v",
            f"--gpu-name={capability[1]}",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in re.findall(r"\d+ bytes spill \w+", done.stderr) if not line.startswith("0 ")]


def _spilled_on_amd(assembly: str) -> list[str]:
    return [line for line in re.findall(r"[sv]gpr_spill_count: *\d+", assembly) if not line.endswith(" 0")]
