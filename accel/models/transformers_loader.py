"""Lets transformers load all checkpoints of hasten: importing this module registers the loader.

transformers 5.23 with compressed-tensors 0.20 loads packed layers in two ways, and each lacks something. Prepared
modules: not embeddings, for which its `_init_weights` needs a weight; not tied pairs; not zero points; and weights that
are always unpacked in bfloat16 do not fit a model of another dtype. With the key `dequantize`: all layers are read on
the grid of the first config group. Experts it unpacks in either case, though not of all formats.

Here modules are prepared where that works, so that inputs are rounded, and their unpacked weights get the model's
dtype. Elsewhere every tensor is unpacked by the scheme of its own module while it is read, and transformers ties the
unpacked weights; inputs are then not rounded. Experts are unpacked while they are read, whatever their format. Hooks
rotate inputs where the config has a transform_config, which transformers does not read.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize, get_experts_scheme
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from hasten.accel.activations.hadamard import parsed
from hasten.accel.activations.hooks import rotate_inputs
from hasten.accel.errors import UserError
from hasten.accel.models.experts import DOWN, is_fused
from hasten.accel.models.experts_loading import missing_rules
from hasten.accel.models.loading_needs import initialises_layers
from hasten.accel.models.packed import PACKED, PARTS, SCALE, WEIGHT, must_unpack

_METHOD = "compressed-tensors"
# Names of the scales of experts' inputs.
_EXPERT_INPUTS = r"\.experts\.\d+\..*\.input_(global_)?scale$"


class _Unpack(CompressedTensorsDequantize):
    """Unpacks the tensors of a module by the scheme of its config group, and experts by that of theirs."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The weight by its name, from stored tensors by what follows the module's name; of experts, all of them."""
        assert full_layer_name is not None
        dtype = kwargs["model"].get_parameter(full_layer_name).dtype
        if not input_dict.keys() & {WEIGHT, PACKED, SCALE}:
            return self._experts(input_dict, dtype)
        parts = {leaf: _listed(value)[0] for leaf, value in input_dict.items()}
        if SCALE not in parts:
            return {full_layer_name: parts[WEIGHT].to(dtype)}
        return {full_layer_name: self._unpacked(parts, self._scheme(full_layer_name, kwargs["model"]), dtype)}

    def _experts(self, input_dict: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Stacked weights of experts by the pattern of their names, from lists of tensors by patterns."""
        scheme = get_experts_scheme(self.hf_quantizer.compressor.quantization_config)
        stacked = {}
        for name, values in input_dict.items():
            layer, _, leaf = name.rpartition(".")
            if leaf not in (WEIGHT, PACKED):
                continue
            named = {part: f"{layer}.{part}" for part in (leaf, *PARTS)}
            lists = {part: _listed(input_dict[key]) for part, key in named.items() if key in input_dict}
            if SCALE not in lists:
                stacked[name] = values
                continue
            experts = [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
            stacked[name] = torch.stack([self._unpacked(parts, scheme, dtype) for parts in experts])
        return stacked

    def _unpacked(self, parts: dict[str, Tensor], scheme: Any, dtype: torch.dtype) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        form = scheme.format or self.hf_quantizer.compressor.quantization_config.format
        weight: Tensor = BaseCompressor.get_value_from_registry(getattr(form, "value", form)).decompress(parts, scheme)[
            WEIGHT
        ]
        return weight.to(dtype)

    def _scheme(self, name: str, model: Any) -> Any:
        from compressed_tensors.utils.match import match_targets

        module = name.removesuffix(f".{WEIGHT}")
        groups = self.hf_quantizer.compressor.quantization_config.config_groups.values()
        schemes = {target: group for group in groups for target in group.targets}
        return schemes[match_targets(module, model.get_submodule(module), list(schemes))[0]]


class _Config(CompressedTensorsConfig):
    """transformers' config, which keeps the transform_config."""

    def __init__(self, *arguments: Any, transform_config: dict[str, Any] | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.described_transforms = transform_config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        described: dict[str, Any] = super().to_dict()
        return described | ({"transform_config": self.described_transforms} if self.described_transforms else {})


class Loader(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, which unpacks while loading where transformers alone fails."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        known = self.compressor.quantization_config
        if not quantization_config.dequantize and known is not None and must_unpack(known.model_dump()):
            quantization_config.dequantize = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Unpack everything where transformers would not read the experts, or cannot initialise packed layers."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        if missing_rules(model, get_model_conversion_mapping(model)) or initialises_layers(model.config.to_dict()):
            self.quantization_config.dequantize = True
        # Experts are fused and do not round their inputs, whose scales are for servers.
        ignored = set(model._keys_to_ignore_on_load_unexpected or ()) | {_EXPERT_INPUTS}
        model._keys_to_ignore_on_load_unexpected = ignored | set(self._rotate_inputs(model))
        super()._process_model_before_weight_loading(model, **kwargs)

    def _rotate_inputs(self, model: Any) -> list[str]:
        """Rotate inputs as the transform_config says; patterns of the names of stored matrices, which are not read."""
        config = getattr(self.quantization_config, "described_transforms", None)
        transforms = parsed(config, model.name_or_path)
        for path, module in model.named_modules():
            experts = f"{path}.0.{DOWN}" if is_fused(module) else None
            for transform in transforms:
                if experts is not None and transform.matches(experts):
                    raise UserError(f"{transform.name} in transform_config rotates inputs of experts, {path}")
                if isinstance(module, torch.nn.Linear) and transform.matches(path):
                    rotate_inputs(module, transform.rotation(module.in_features))
        return [rf"\.{name}_\w+\.weight$" for name in (config or {}).get("config_groups") or {}]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' rules for names, and those for experts that it lacks."""
        added = missing_rules(model, weight_conversions)
        conversions: list[Any] = super().update_weight_conversions([*weight_conversions, *added], model)
        return conversions

    def get_load_operations(self) -> dict[str, Any]:
        """The operation for checkpoint tensors that no module is prepared for."""
        return {"dequantize": _Unpack}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Unpack prepared modules at once where their weights have another dtype than the model."""
        model = super()._process_model_after_weight_loading(model, **kwargs)
        prepared = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
        if prepared and model.dtype != torch.bfloat16:
            self.compressor.decompress_model(model)
            for module in prepared:
                # Attentions whose keys and values are rounded have a scheme and no weight.
                if hasattr(module, "weight"):
                    module.weight.data = module.weight.data.to(model.dtype)
        return model


def _listed(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _Config
AUTO_QUANTIZER_MAPPING[_METHOD] = Loader
