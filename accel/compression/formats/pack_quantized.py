"""compressed-tensors `pack-quantized`: integer codes packed into int32 words, as transformers and vLLM read them.

Source: github.com/vllm-project/compressed-tensors, whose own functions pack and unpack. They are imported inside
functions: the machines of the GPU checks do not have the library, and write no checkpoint.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from hasten.accel.compression.formats.base import Format
from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme
from hasten.accel.models.tensor_names import below_holder, is_outer

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackQuantized(Format):
    """The default format. It stores signed codes: code minus 2**(bits - 1)."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """`weight_packed`, `weight_scale`, `weight_shape` and, on asymmetric grids, `weight_zero_point`."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits = weight.scheme.bits
        stored = {
            # In pieces, because packing needs several times the memory of the codes.
            "weight_packed": torch.cat(
                [pack_to_int32(_signed(part, bits), bits) for part in weight.codes.split(_ROWS_AT_ONCE)]
            ),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if not weight.scheme.symmetric:
            rows, groups = weight.zero_point.shape
            packed = pack_to_int32(_signed(weight.zero_point, bits), bits, packed_dim=0)
            missing = zero_point_words(rows, groups, bits) - len(packed)
            stored["weight_zero_point"] = torch.nn.functional.pad(packed, (0, 0, 0, missing))
        return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}

    def unpack(self, stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """Weight (R, C) by the library's own decompression, in the dtype of the scale."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        described = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": _arguments(scheme)})
        return compressor.decompress(dict(stored), described)["weight"]

    def announce(self, schemes: Mapping[str, Scheme], untouched: list[str], experts: bool) -> dict[str, object]:
        """One config group for each distinct scheme, and `dequantize` where there are zero points.

        compressed-tensors 0.20 expects unpacked zero points in the modules that it prepares, so that transformers can
        load such layers only with the key `dequantize`. With the key, however, transformers 5.23 reads all layers but
        the experts on the first grid. So experts alone, which it unpacks in any case, do not set it. vLLM ignores it.

        transformers 5.23 also fails to initialise a packed embedding without the key. With several grids and an
        embedding or zero points, it cannot load the checkpoint: models/transformers_loader.py does. The key is then not
        set, so that transformers alone stops with an error and does not read wrong weights.
        """
        distinct: dict[tuple[Scheme, bool], list[str]] = {}
        for name, scheme in schemes.items():
            distinct.setdefault((scheme, experts and ".experts." in name), []).append(name)
        groups = {}
        for number, ((scheme, is_expert), names) in enumerate(distinct.items()):
            groups[f"group_{number}"] = {
                # With one scheme a class name suffices, and keeps the config short.
                "targets": _targets(names) if len(distinct) == 1 else [_one_of(names, is_expert)],
                "weights": _arguments(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        described: dict[str, object] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": untouched,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        needs_it = any(not scheme.symmetric or _is_embedding(name) for name, scheme in schemes.items())
        grids = {scheme for scheme, is_expert in distinct if not is_expert}
        if needs_it and (len(grids) == 1 or not any(map(is_outer, schemes))):
            described["dequantize"] = True
        return described


def zero_point_words(rows: int, groups: int, bits: int) -> int:
    """Words of the packed zero points of one column of groups, for rows with several groups each."""
    words = ceil(rows * bits / 32)
    # compressed-tensors 0.20 reads the bytes of the transposed words, which fails for a single row of 4-bit ones.
    return 2 if words == 1 and bits == 4 and groups > 1 else words


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _arguments(scheme: Scheme) -> dict[str, object]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
    }


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
        # Loaders search for the word `experts`; the experts of all blocks share one scheme.
        return "re:.*experts.*"
    tails = sorted({below_holder(name) if not is_outer(name) else _last(name) for name in names})
    return "re:.*(?:" + "|".join(re.escape(tail) for tail in tails) + ")$"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
