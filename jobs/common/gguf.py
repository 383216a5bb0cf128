"""Shared by jobs that write GGUF files: the options of the file, and the levels that bits stand for."""

from collections.abc import Sequence

from hasten.accel.compression.outputs.gguf import FILE, GgufOptions
from hasten.accel.errors import UserError
from hasten.cluster.storage.naming import as_given
from hasten.jobs.common.schema import FORMATS, GgufFile

_OF_BITS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}


def gguf_options(form: str, given: GgufFile, head_bits: object, embedding_bits: object) -> GgufOptions | None:
    """Options of the file; None where another format is written. UserError for options of other formats."""
    if form != FORMATS[1]:
        return None
    for name, value, instead in (
        ("head_bits", head_bits, "gguf.output_type"),
        ("embedding_bits", embedding_bits, "gguf.embedding_type"),
    ):
        if value:
            raise UserError(f"{name}={value} has no place in a GGUF file: give {instead}, such as q6_k")
    return GgufOptions(given.output_type, given.embedding_type, given.pre_tokenizer)


def level_of_bits(bits: int) -> str:
    """Name of the level of so many bits that llama.cpp loads; UserError where there is none."""
    if bits not in _OF_BITS:
        raise UserError(f"bits={bits} has no type in GGUF: expected one of {', '.join(map(str, _OF_BITS))}")
    return _OF_BITS[bits]


def levels_of_bits(bits: Sequence[int], reference: int) -> list[str]:
    """Names of the levels of these bits; that of the reference, which the next block is calibrated on, is the last."""
    return [level_of_bits(width) for width in sorted(bits, key=lambda width: (width == reference, width))]


def print_gguf(output: str) -> None:
    """Print where the file is."""
    print(f"llama.cpp loads {as_given(output)}/{FILE}")
