"""Reading weights that compressed-tensors packed: the scheme of a module, and its unpacked weight.

compressed-tensors itself matches names and unpacks, so that the weights are those that transformers would run. It is
imported inside functions: plain checkpoints are read without it, also by the GPU checks, whose machines do not have it.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.accel.compression.activations.description import parsed
from hasten.accel.compression.activations.scales import STRATEGIES, AttentionScheme
from hasten.accel.compression.activations.scheme import InputScheme
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS, PackedWeight, unpack_codes, widened

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

PACKED = "weight_packed"
# Tensors that count in a layer's size; weight_shape is not data, it states the shape as a header does.
COUNTED = (PACKED, "weight_scale", "weight_zero_point")
PARTS = (*COUNTED, "weight_shape")
# Groups of columns where activation order has permuted them; an older form, which hasten does not write.
GROUP_INDEX = "weight_g_idx"
_FORMAT = "pack-quantized"


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of weights alone, all of them pack-quantized."""
    groups = config.get("config_groups") or {}
    return config.get("quant_method", "compressed-tensors") == "compressed-tensors" and all(
        (group.get("format") or config.get("format")) == _FORMAT and not group.get("input_activations")
        for group in groups.values()
    )


class Packing:
    """The quantization_config of a checkpoint; UserError where it is not pack-quantized.

    where: the file it was read from, for error messages.
    """

    def __init__(self, config: Mapping[str, object], where: str):
        from compressed_tensors.quantization import QuantizationConfig

        self._where = where
        method = config.get("quant_method", "compressed-tensors")
        if method != "compressed-tensors":
            raise UserError(f"quant_method={method!r} in {where} is not supported: only compressed-tensors is")
        # transformers adds keys of its own to those of compressed-tensors.
        known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
        try:
            self._config = QuantizationConfig.model_validate(known)
        except ValueError as error:
            raise UserError(f"quantization_config in {where} is not valid: {_first_line(error)}") from None
        self._schemes: dict[str, QuantizationScheme] = {}
        for group in self._config.config_groups.values():
            form = getattr(group, "format", None) or self._config.format
            if form != _FORMAT:
                raise UserError(f"quantization format={str(form)!r} in {where} is not supported: only {_FORMAT} is")
            for target in group.targets:
                self._schemes[target] = group

    def scheme(self, module: str) -> "QuantizationScheme | None":
        """QuantizationScheme of the module with this name in the checkpoint; None for a plain module."""
        from compressed_tensors.utils.match import is_match, match_targets

        linear = torch.nn.Linear(1, 1, device="meta")
        if not is_match(module, linear, list(self._schemes), self._config.ignore or []):
            return None
        # The library sorts matches from the most specific on, and takes the first one itself.
        return self._schemes[match_targets(module, linear, list(self._schemes))[0]]

    def inputs(self, module: str) -> InputScheme | None:
        """How the inputs of a module are rounded; None where they are not."""
        scheme = self.scheme(module)
        if scheme is None or scheme.input_activations is None:
            return None
        return parsed(scheme.input_activations.model_dump(), f"config group of {module} in {self._where}")

    def attention(self, classes: Collection[str]) -> AttentionScheme | None:
        """How keys and values, and queries, are rounded in attentions of these classes; None where they are not."""
        arguments = self._config.kv_cache_scheme
        # Attention is quantized by a group that targets its class, and quantizes keys and values alike.
        groups = (group for group in self._config.config_groups.values() if set(group.targets) & set(classes))
        group = next((group for group in groups if group.input_activations is not None), None)
        if group is not None:
            arguments = group.input_activations
        if arguments is None:
            return None
        scheme = parsed(arguments.model_dump(), f"kv_cache_scheme in {self._where}")
        if scheme not in (AttentionScheme(strategy).states for strategy in STRATEGIES):
            raise UserError(
                f"kv_cache_scheme in {self._where} is {arguments.model_dump()}: supported are static FP8 scales (num_bits "
                f"8, type float, dynamic false) of strategy {' or '.join(STRATEGIES)}"
            )
        return AttentionScheme(scheme.strategy, group is not None)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of some modules, or states of attentions, are rounded."""
        groups = self._config.config_groups.values()
        return self._config.kv_cache_scheme is not None or any(group.input_activations for group in groups)

    def unpack(self, module: str, parts: dict[str, Tensor]) -> Tensor:
        """Weight [rows, columns], in the dtype of its scales, from its stored tensors."""
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

        scheme = self.scheme(module)
        if scheme is None or scheme.weights is None:
            raise UserError(f"{module}.{PACKED} in {self._where} is packed, but no config group targets it")
        try:
            return PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        except (AssertionError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{module}.{PACKED} in {self._where} cannot be unpacked: {_first_line(error)}") from None

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> PackedWeight:
        """The weight as it is stored; codes of a width that no kernel reads become wider.

        parts may have GROUP_INDEX, the group (C,) of each column.
        """
        scheme = self.scheme(module)
        args = None if scheme is None else scheme.weights
        if args is None:
            raise UserError(f"{module}.{PACKED} in {self._where} is packed, but no config group targets it")
        rows, columns = parts["weight_shape"].tolist()
        bits, codes, scale, zero_point = args.num_bits, parts[PACKED], parts["weight_scale"], None
        if not args.symmetric:
            zero_point = unpack_codes(parts["weight_zero_point"].T.contiguous(), bits, rows).T
        wider = min(width for width in BITS if width >= bits)
        if wider > bits:
            codes = widened(codes, bits, columns, wider)
            zero_point = None if zero_point is None else zero_point + (2 ** (wider - 1) - 2 ** (bits - 1))
        index = parts.get(GROUP_INDEX)
        index = None if index is None or int(index.min()) < 0 else index.int()
        return PackedWeight(codes, scale.expand(rows, -1), columns, wider, zero_point, index)


def needs_loader(config: Mapping[str, Any] | None) -> bool:
    """Whether transformers cannot load a checkpoint with this quantization_config by itself.

    See models/transformers_loader.py, which can.
    """
    if not config or config.get("dequantize") or config.get("format") != _FORMAT:
        return False
    groups = config["config_groups"].values()
    if any(group.get("weights") is None for group in groups):
        return False
    targets = [target for group in groups for target in group["targets"]]
    return any("embed_tokens" in target for target in targets) or not all(
        group["weights"]["symmetric"] for group in groups
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
