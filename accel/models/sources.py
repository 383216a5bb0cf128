"""How the weights of a checkpoint are quantized, by the quant_method of its config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hasten.accel.errors import UserError
from hasten.accel.models.fp8_block import Fp8Quantization
from hasten.accel.models.mxfp4_blocks import Mxfp4Quantization
from hasten.accel.models.packed import Packing
from hasten.accel.models.quantized import Quantization

_METHODS: dict[str, type[Quantization]] = {
    "compressed-tensors": Packing,
    "fp8": Fp8Quantization,
    "mxfp4": Mxfp4Quantization,
}
# Names of the section, the second from before transformers had the first.
_SECTIONS = ("quantization_config", "compression_config")


def open_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantization of a checkpoint's config; None for a plain checkpoint.

    where: the config's file, for error messages. UserError for a method without a reader.
    """
    section = next((holder[key] for holder in _holders(config) for key in _SECTIONS if holder.get(key)), None)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise UserError(f"quantization_config in {where} is {section!r}: it must be a JSON object")
    method = section.get("quant_method", "compressed-tensors")
    if method not in _METHODS:
        *others, last = _METHODS
        raise UserError(
            f"quant_method={method!r} in {where} is not supported: only {', '.join(others)} and {last} are; "
            "give the checkpoint that it was quantized from"
        )
    return _METHODS[method](section, where, model_dtype(config))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without what it says of the quantization of its weights."""
    plain = {key: value for key, value in config.items() if key not in _SECTIONS}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a checkpoint's config names; bfloat16 where it names none of at least two bytes."""
    for holder in _holders(config):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(holder.get(key)).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return torch.bfloat16


def _holders(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config itself, and that of the text model of a multimodal one."""
    yield config
    if isinstance(text := config.get("text_config"), Mapping):
        yield text
