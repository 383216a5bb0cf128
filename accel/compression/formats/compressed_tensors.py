"""compressed-tensors: the format of checkpoints that transformers and vLLM load.

Source: github.com/vllm-project/compressed-tensors, whose own compressors unpack. They are imported inside functions:
the machines of the GPU checks do not have the library, and write no checkpoint. Layers may be packed in several ways;
each config group names its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import Format, LoaderScheme, Packing, StoredTensor
from hasten.accel.compression.formats.fp4 import PackedFP4
from hasten.accel.compression.formats.pack_quantized import PackQuantized
from hasten.accel.compression.formats.quantized import Quantized
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme
from hasten.accel.models.tensor_names import below_holder, is_outer

# Codes in words, and in bytes: of int8 and of FP8 next to rounded inputs, and of either next to others.
INTEGERS, BYTES_INT, BYTES_FLOAT, BYTES = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
MXFP8, MXFP4, NVFP4 = "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
_PACKINGS: dict[str, Packing] = {
    INTEGERS: PackQuantized(),
    **{name: Quantized(name) for name in (BYTES_INT, BYTES_FLOAT, BYTES, MXFP8)},
    **{name: PackedFP4(name) for name in (MXFP4, NVFP4)},
}
# Of the checkpoint, where its layers are packed in several ways.
_MIXED = "mixed-precision"
# Of one without quantized layers, whose inputs are rotated.
_DENSE = "dense"
# Dtypes of stored scales that are not plain, as compressed-tensors writes them.
_SCALE_DTYPES = {"fp8": "torch.float8_e4m3fn", "power_of_two": "torch.uint8"}


@dataclass(frozen=True)
class CompressedTensors(Format):
    """The default format."""

    def tensors(self, scheme: LoaderScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Those of the packing."""
        return _PACKINGS[scheme.packing].tensors(scheme.weights, rows, columns, dtype)

    def pack(self, weight: QuantizedWeight, scheme: LoaderScheme) -> dict[str, Tensor]:
        """See the packings."""
        return _PACKINGS[scheme.packing].pack(weight)

    def unpack(self, stored: Mapping[str, Tensor], scheme: LoaderScheme) -> Tensor:
        """Weight (R, C) by the library's own decompression, in the dtype of plain scales, or else in bfloat16."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        compressor = BaseCompressor.get_value_from_registry(scheme.packing)
        described = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": _weights(scheme.weights)})
        weight: Tensor = compressor.decompress(dict(stored), described)["weight"]
        return weight

    def announce(self, schemes: Mapping[str, LoaderScheme], untouched: list[str], experts: bool) -> dict[str, object]:
        """One config group for each distinct scheme, and `dequantize` where there are zero points.

        compressed-tensors 0.20 expects unpacked zero points in the modules that it prepares, so that transformers can
        load such layers only with the key `dequantize`. With the key, however, transformers 5.23 reads all layers but
        the experts on the first grid. So experts alone, which it unpacks in any case, do not set it. vLLM ignores it.

        transformers 5.23 also fails to initialise a packed embedding without the key. With several grids or packings,
        and an embedding or zero points, it cannot load the checkpoint: models/transformers_loader.py does. The key is
        then not set, so that transformers alone stops with an error and does not read wrong weights.
        """
        distinct: dict[tuple[LoaderScheme, bool], list[str]] = {}
        # Experts first: transformers takes the first group with the word `experts` for theirs, and shared ones have it.
        for name, scheme in sorted(schemes.items(), key=lambda item: ".experts." not in item[0]):
            distinct.setdefault((scheme, experts and ".experts." in name), []).append(name)
        groups = {}
        for number, ((scheme, is_expert), names) in enumerate(distinct.items()):
            groups[f"group_{number}"] = {
                # With one scheme a class name suffices, and keeps the config short.
                "targets": _targets(names) if len(distinct) == 1 and not is_expert else [_one_of(names, is_expert)],
                "weights": _weights(scheme.weights),
                "input_activations": _inputs(scheme.inputs),
                "output_activations": None,
                "format": scheme.packing,
            }
        packings = list(dict.fromkeys(scheme.packing for scheme, _ in distinct))
        described: dict[str, object] = {
            "quant_method": "compressed-tensors",
            "format": packings[0] if len(packings) == 1 else _MIXED if packings else _DENSE,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": untouched,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        needs_it = any(not scheme.weights.symmetric or _is_embedding(name) for name, scheme in schemes.items())
        grids = {scheme for scheme, is_expert in distinct if not is_expert}
        if needs_it and len(packings) == 1 and (len(grids) == 1 or not any(map(is_outer, schemes))):
            described["dequantize"] = True
        return described


def _weights(scheme: WeightScheme) -> dict[str, object]:
    """compressed-tensors' QuantizationArgs of the weights."""
    described: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size if "group" in scheme.strategy else None,
        "dynamic": False,
    }
    if scheme.strategy == "block":
        described["block_structure"] = [scheme.block_rows, scheme.group_size]
    if scheme.scale_format != "plain":
        described["scale_dtype"] = _SCALE_DTYPES[scheme.scale_format]
    return described


def _inputs(scheme: InputScheme | None) -> dict[str, object] | None:
    """The same of the inputs; None where they are not rounded."""
    if scheme is None:
        return None
    dynamic: object = "local" if scheme.strategy == "tensor_group" else not scheme.static
    described: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": dynamic,
    }
    if scheme.scale != "plain":
        described["scale_dtype"] = _SCALE_DTYPES[scheme.scale]
    return described


def _is_embedding(name: str) -> bool:
    return is_outer(name) and name.endswith("embed_tokens")


def _targets(names: list[str]) -> list[str]:
    """Targets of the only config group."""
    embeddings = [name for name in names if _is_embedding(name)]
    # Not the class Embedding, which position embeddings also have.
    return ["Linear", *([_one_of(embeddings, experts=False)] if embeddings else [])]


def _one_of(names: list[str], experts: bool) -> str:
    """Regular expression that matches exactly these layers, whatever prefix a server puts before the list of blocks."""
    if experts:
        # Loaders search for the word `experts`; the experts of all blocks share one scheme. Shared experts are others.
        return r"re:.*\bexperts\..*"
    tails = sorted({below_holder(name) if not is_outer(name) else _last(name) for name in names})
    return "re:.*(?:" + "|".join(re.escape(tail) for tail in tails) + ")$"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
