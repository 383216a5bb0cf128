"""Reading weights that compressed-tensors compressed: the scheme of a module, and its dequantized weight.

compressed-tensors itself matches names and decompresses, so that the weights are those that transformers would run. It
is imported inside functions: plain checkpoints are read without it, also by the GPU checks, whose machines do not have
it.
"""

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.accel.activations.description import parsed as parse_inputs
from hasten.accel.activations.hadamard import InputHadamard, is_matrix, is_online
from hasten.accel.activations.hadamard import parsed as parse_transforms
from hasten.accel.activations.scales import STRATEGIES, AttentionScheme
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError
from hasten.accel.models.quantized import Quantization, QuantizedTensor, belongs_to_activations, check_rows
from hasten.accel.models.shards import Stored
from hasten.kernels.packed_weight import BITS, PackedWeight, unpack_codes, widened

if TYPE_CHECKING:
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

WEIGHT = "weight"
PACKED = "weight_packed"
SCALE = "weight_scale"
GLOBAL_SCALE = "weight_global_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"
# Groups of columns where activation order has permuted them; an older form, which hasten does not write.
GROUP_INDEX = "weight_g_idx"
# What may be stored of a compressed weight.
PARTS = (PACKED, SCALE, GLOBAL_SCALE, ZERO_POINT, SHAPE, GROUP_INDEX)
_FORMAT = "pack-quantized"
_DENSE = "dense"
# Formats of a config whose groups have formats of their own, and of one that names none.
_UNNAMED = ("mixed-precision", "fakequant")
# Formats that pack codes into bytes have no weight_shape.
_BITS_PACKED_IN_BYTES = {"nvfp4-pack-quantized": 4, "mxfp4-pack-quantized": 4, "mxfp6-pack-quantized": 6}
# Formats whose weights are unpacked in bfloat16, whatever the model's dtype; and those of which transformers 5.23 fails
# to unpack experts, or does so without the scale that all others are relative to.
_IN_BFLOAT16 = ("mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
_EXPERTS_LACK = ("int-quantized", "naive-quantized", "mxfp8-quantized", "nvfp4-pack-quantized")
# Types of weights that mean nothing without scales.
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of weights alone, all of them pack-quantized."""
    groups = config.get("config_groups") or {}
    return config.get("quant_method", "compressed-tensors") == "compressed-tensors" and all(
        (group.get("format") or config.get("format")) == _FORMAT and not group.get("input_activations")
        for group in groups.values()
    )


class Packing(Quantization):
    """The quantization_config of a checkpoint of compressed-tensors; UserError where it has no compressor for it."""

    def __init__(self, config: Mapping[str, Any], where: str, dtype: torch.dtype = torch.bfloat16) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        super().__init__(config, where, dtype)
        # transformers adds keys of its own to those of compressed-tensors.
        known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
        try:
            parsed = QuantizationConfig.model_validate(_without_order(known))
        except ValueError as error:
            raise UserError(f"quantization_config in {where} is not valid: {_first_line(error)}") from None
        self._ignore = list(parsed.ignore or [])
        self._cache = parsed.kv_cache_scheme
        self._schemes: dict[str, QuantizationScheme] = {}
        for group in parsed.config_groups.values():
            group.format = self._checked(group.format or parsed.format, group)
            for target in group.targets:
                self._schemes[target] = group
        self._checked((config.get("sparsity_config") or {}).get("format", _DENSE), None)
        transforms = config.get("transform_config")
        self._transforms = parse_transforms(transforms, where)
        self._matrices = list((transforms or {}).get("config_groups") or {})

    @property
    def title(self) -> str:
        """See Quantization."""
        kinds = dict.fromkeys(
            f"{_text(scheme.format)} of {scheme.weights.num_bits} bits"
            for scheme in self._schemes.values()
            if scheme.weights is not None
        )
        return f"compressed-tensors {', '.join(kinds)}" if kinds else "compressed-tensors, none of its weights"

    def input_rotation(self, module: str, columns: int) -> InputHadamard | None:
        """See Quantization."""
        found = [transform for transform in self._transforms if transform.matches(module)]
        if len(found) > 1:
            names = " and ".join(transform.name for transform in found)
            raise UserError(
                f"the transform_config of {self.where} rotates inputs of {module} by {names}: by one, at most"
            )
        return found[0].rotation(columns) if found else None

    def scheme(self, module: str) -> "QuantizationScheme | None":
        """QuantizationScheme of the module with this name in the checkpoint; None for a plain module."""
        from compressed_tensors.utils.match import is_match, match_targets

        linear = torch.nn.Linear(1, 1, device="meta")
        if not is_match(module, linear, list(self._schemes), self._ignore):
            return None
        # The library sorts matches from the most specific on, and takes the first one itself.
        return self._schemes[match_targets(module, linear, list(self._schemes))[0]]

    def inputs(self, module: str) -> InputScheme | None:
        """See Quantization."""
        scheme = self.scheme(module)
        if scheme is not None and scheme.output_activations is not None:
            raise UserError(
                f"config group of {module} in {self.where} has output_activations: only inputs can be rounded"
            )
        if scheme is None or scheme.input_activations is None:
            return None
        return parse_inputs(scheme.input_activations.model_dump(), f"config group of {module} in {self.where}")

    def attention(self, classes: Collection[str]) -> AttentionScheme | None:
        """See Quantization."""
        arguments = self._cache
        # Attention is quantized by a group that targets its class, and quantizes keys and values alike.
        groups = (group for target, group in self._schemes.items() if target in classes)
        group = next((group for group in groups if group.input_activations is not None), None)
        if group is not None:
            arguments = group.input_activations
        if arguments is None:
            return None
        scheme = parse_inputs(arguments.model_dump(), f"kv_cache_scheme in {self.where}")
        if scheme not in (AttentionScheme(strategy).states for strategy in STRATEGIES):
            raise UserError(
                f"kv_cache_scheme in {self.where} is {arguments.model_dump()}: supported are static FP8 scales "
                f"(num_bits 8, type float, dynamic false) of strategy {' or '.join(STRATEGIES)}"
            )
        return AttentionScheme(scheme.strategy, group is not None)

    @property
    def rounds_inputs(self) -> bool:
        """See Quantization."""
        return self._cache is not None or any(
            group.input_activations or group.output_activations for group in self._schemes.values()
        )

    def tensors(self, stored: Mapping[str, Stored]) -> tuple[dict[str, QuantizedTensor], set[str]]:
        """See Quantization."""
        parts: dict[str, dict[str, Stored]] = {}
        claimed = {name for name in stored if belongs_to_activations(name) or is_matrix(name, self._matrices)}
        stored = {name: place for name, place in stored.items() if name not in claimed}
        for name, place in stored.items():
            module, _, leaf = name.rpartition(".")
            if leaf in PARTS or leaf == WEIGHT:
                parts.setdefault(module, {})[leaf] = place
        tensors: dict[str, QuantizedTensor] = {}
        for module, found in parts.items():
            if WEIGHT in found and found[WEIGHT].dtype not in _CODES:
                # A plain weight, whose scales are those of a format that does not compress.
                claimed.update(f"{module}.{leaf}" for leaf in found if leaf != WEIGHT)
                continue
            claimed.update(f"{module}.{leaf}" for leaf in found)
            tensors[f"{module}.{WEIGHT}"] = self._open(module, found)
        return tensors, claimed

    def _open(self, module: str, parts: dict[str, Stored]) -> "CompressedWeight":
        needed = (PACKED, SCALE) if PACKED in parts else (WEIGHT, SCALE)
        lacking = [leaf for leaf in needed if leaf not in parts]
        if lacking:
            folder = next(iter(parts.values())).file.parent
            raise UserError(f"tensor {module}.{lacking[0]} is missing from {folder}")
        return CompressedWeight(f"{module}.{WEIGHT}", parts, self)

    def _checked(self, form: "CompressionFormat | str", scheme: "QuantizationScheme | None") -> "CompressionFormat":
        """A format that compressed-tensors reads, that which it chooses for a scheme where the config names none."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.config import CompressionFormat

        if scheme is not None and form in _UNNAMED:
            return infer_module_format(torch.nn.Linear, scheme) if scheme.weights else CompressionFormat.dense
        readable = BaseCompressor.registered_names()
        name = _text(form)
        if name not in readable:
            known = ", ".join(sorted(readable))
            raise UserError(f"quantization format={name!r} in {self.where} is not supported: readable are {known}")
        return CompressionFormat(name)


class CompressedWeight(QuantizedTensor):
    """A weight (R, C) that compressed-tensors compressed, read by its own decompression."""

    def __init__(self, name: str, parts: Mapping[str, Stored], packing: Packing) -> None:
        super().__init__(name, parts)
        self._packing = packing
        self._shape: tuple[int, ...] | None = None

    @property
    def module(self) -> str:
        """Name of the layer."""
        return self.name.removesuffix(f".{WEIGHT}")

    @property
    def is_packed(self) -> bool:
        """Whether it is stored as packed integers, which `packed` reads."""
        return PACKED in self.parts and SHAPE in self.parts

    @property
    def nbytes(self) -> int:
        """Bytes on disk; weight_shape is not data, it states the shape as a header does."""
        return sum(part.nbytes for leaf, part in self.parts.items() if leaf != SHAPE)

    @property
    def scheme(self) -> "QuantizationScheme":
        """The scheme of its config group; UserError where there is none."""
        scheme = self._packing.scheme(self.module)
        if scheme is None or scheme.weights is None:
            leaf = PACKED if PACKED in self.parts else WEIGHT
            raise UserError(f"{self.module}.{leaf} in {self._packing.where} is packed, but no config group targets it")
        return scheme

    @property
    def arguments(self) -> "QuantizationArgs":
        """See QuantizedTensor."""
        arguments = self.scheme.weights
        assert arguments is not None
        return arguments

    @property
    def shape(self) -> tuple[int, ...]:
        """See QuantizedTensor."""
        if self._shape is None:
            self._shape = self._read_shape()
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales, where they have the model's; bfloat16, the library's choice, for others."""
        scale = self.parts[SCALE].dtype
        if not self.is_packed and (PACKED in self.parts or scale.itemsize == 1):
            return torch.bfloat16
        if scale.itemsize == 1 or not scale.is_floating_point:
            name = str(scale).removeprefix("torch.")
            raise UserError(
                f"tensor {self.module}.{SCALE} in {self.file} is stored as {name}: scales of this format are float32, "
                "bfloat16 or float16"
            )
        return scale

    @property
    def has_rows(self) -> bool:
        """Whether rows can be read alone: packed zero points of several rows share words, and blocks share scales."""
        if self.is_packed:
            return ZERO_POINT not in self.parts
        return _text(self.arguments.strategy) != "block"

    def read(self) -> Tensor:
        """See QuantizedTensor."""
        return self._decompress({leaf: part.read() for leaf, part in self.parts.items()}, self.shape)

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """See QuantizedTensor."""
        rows, columns = self.shape
        index = torch.cat([torch.arange(first, first + count) for first, count in runs])
        parts = {}
        for leaf, part in self.parts.items():
            if part.shape[:1] != (rows,) or leaf in (SHAPE, GROUP_INDEX):
                parts[leaf] = part.read()  # of all rows together
            else:
                parts[leaf] = part.read_rows(runs) if len(part.shape) == 2 else part.read()[index]
        if SHAPE in parts:
            parts[SHAPE] = torch.tensor([len(index), columns])
        return self._decompress(parts, (len(index), columns))

    def packed(self) -> PackedWeight:
        """The weight as it is stored; codes of a width that no kernel reads become wider."""
        args = self.arguments
        parts = {leaf: part.read() for leaf, part in self.parts.items()}
        rows, columns = parts[SHAPE].tolist()
        bits, codes, scale, zero_point = args.num_bits, parts[PACKED], parts[SCALE], None
        if not args.symmetric:
            zero_point = unpack_codes(parts[ZERO_POINT].T.contiguous(), bits, rows).T
        wider = min(width for width in BITS if width >= bits)
        if wider > bits:
            codes = widened(codes, bits, columns, wider)
            zero_point = None if zero_point is None else zero_point + (2 ** (wider - 1) - 2 ** (bits - 1))
        index = _group_index(parts)
        return PackedWeight(
            codes, scale.expand(rows, -1), columns, wider, zero_point, None if index is None else index.int()
        )

    def check(self, check_finite: Callable[[Tensor, str], None]) -> None:
        """See QuantizedTensor."""
        for leaf, part in self.parts.items():
            if leaf == WEIGHT and part.dtype.is_floating_point:
                check_rows(part, check_finite, f"{self.module}.{leaf}")
            elif leaf in (SCALE, GLOBAL_SCALE):
                check_finite(part.read(), f"{self.module}.{leaf}")

    def _read_shape(self) -> tuple[int, ...]:
        """Shape of the weight; UserError where a part is missing or does not fit."""
        scheme = None if self.is_packed else self.scheme
        if SHAPE in self.parts:
            rows, columns = self.parts[SHAPE].read().tolist()
            return rows, columns
        assert scheme is not None
        if PACKED in self.parts:
            bits = _BITS_PACKED_IN_BYTES.get(_text(scheme.format))
            if bits is None:
                raise UserError(f"tensor {self.module}.{SHAPE} is missing from {self.file.parent}")
            rows, width = self.parts[PACKED].shape
            shape: tuple[int, ...] = (rows, width * 8 // bits)
        else:
            shape = self.parts[WEIGHT].shape
        for leaf in self._compressor(scheme).compression_param_names(scheme):
            if leaf not in self.parts and leaf.startswith("weight"):
                raise UserError(f"tensor {self.module}.{leaf} is missing from {self.file.parent}")
        self._check_scale(shape)
        return shape

    def _check_scale(self, shape: tuple[int, ...]) -> None:
        """UserError where the number of scales is not that of the scheme."""
        args, found = self.arguments, self.parts[SCALE].shape
        rows, columns = shape
        strategy = _text(args.strategy)
        if strategy == "block":
            height, width = args.block_structure
            expected: tuple[int, ...] = (-(-rows // height), -(-columns // width))
        elif strategy in ("group", "tensor_group"):
            expected = (rows, columns // args.group_size)
        else:
            expected = (rows if strategy == "channel" else 1, 1)
        if prod(found) != prod(expected) or (len(found) == 2 and found != expected):
            raise UserError(
                f"tensor {self.module}.{SCALE} in {self.file} has shape {list(found)}: scales of a weight of "
                f"{list(shape)} with strategy={strategy} have shape {list(expected)}"
            )

    def _decompress(self, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The weight of this shape from its parts, or from some rows of them."""
        scheme = self.scheme
        scale = parts[SCALE]
        if scale.ndim == 1 and scale.numel() == shape[0] and _text(self.arguments.strategy) == "channel":
            parts[SCALE] = scale[:, None]
        try:
            index = _group_index(parts)
            if index is not None:
                return _in_order(parts, scheme, index)
            weight: Tensor = self._compressor(scheme).decompress(parts, scheme)[WEIGHT]
        except (AssertionError, RuntimeError, ValueError, AttributeError, IndexError, KeyError) as error:
            leaf = PACKED if PACKED in parts else WEIGHT
            raise UserError(
                f"{self.module}.{leaf} in {self._packing.where} cannot be unpacked: {_first_line(error)}"
            ) from None
        return weight

    @staticmethod
    def _compressor(scheme: "QuantizationScheme") -> Any:
        from compressed_tensors.compressors import BaseCompressor

        return BaseCompressor.get_value_from_registry(_text(scheme.format))


def _group_index(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The group (C,) of each column, where activation order has permuted them."""
    index = parts.get(GROUP_INDEX)
    # Unset in files whose columns are in order.
    return None if index is None or int(index.min()) < 0 else index.long()


def _in_order(parts: Mapping[str, Tensor], scheme: "QuantizationScheme", index: Tensor) -> Tensor:
    """Weight whose columns have the groups `index` (C,): compressed-tensors 0.20 does not read them any more."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    args = scheme.weights
    assert args is not None
    scale, shape = parts[SCALE], torch.Size(parts[SHAPE].tolist())
    codes = unpack_from_int32(parts[PACKED], args.num_bits, shape).to(scale.dtype)
    if not args.symmetric:
        groups = torch.Size((shape[0], scale.shape[-1]))
        zero_point = unpack_from_int32(parts[ZERO_POINT], args.num_bits, groups, packed_dim=0)
        codes -= zero_point.to(scale.dtype)[:, index]
    return codes * scale[:, index]


def _without_order(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the activation order, whose old values version 0.20 refuses: the group indices say it all."""
    groups = {}
    for name, group in (config.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        groups[name] = group
        if isinstance(weights, Mapping) and "actorder" in weights:
            groups[name] = {**group, "weights": {**weights, "actorder": None}}
    return {**config, "config_groups": groups}


def _text(value: Any) -> str:
    """The value of one of the library's enums."""
    return str(getattr(value, "value", value))


def needs_loader(config: Mapping[str, Any] | None, dtype: str | None = None) -> bool:
    """Whether transformers cannot load a checkpoint with this quantization_config by itself.

    dtype: of the checkpoint's config. See models/transformers_loader.py, which can load it.
    """
    if not config or not _is_read_by_name(config):
        return False
    if must_unpack(config) or is_online(config):
        return True
    for group in config["config_groups"].values():
        form = _text(group.get("format") or config.get("format"))
        if form in _EXPERTS_LACK and any("experts" in target for target in group["targets"]):
            return True
        if form in _IN_BFLOAT16 and dtype not in (None, "bfloat16"):
            return True
    return False


def must_unpack(config: Mapping[str, Any]) -> bool:
    """Whether transformers cannot prepare the modules of a checkpoint: packed embeddings, and zero points."""
    if config.get("dequantize") or not _is_read_by_name(config):
        return False
    # A group without weights is that of attentions.
    groups = [group for group in config["config_groups"].values() if group.get("weights") is not None]
    targets = [target for group in groups for target in group["targets"]]
    return any("embed_tokens" in target for target in targets) or not all(
        group["weights"]["symmetric"] for group in groups
    )


def _is_read_by_name(config: Mapping[str, Any]) -> bool:
    """Whether this is a config of compressed-tensors, all of whose groups have weights, but for those of attentions."""
    groups = (config.get("config_groups") or {}).values()
    return config.get("quant_method", "compressed-tensors") == "compressed-tensors" and all(
        group.get("weights") is not None or any("Attention" in target for target in group["targets"])
        for group in groups
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
