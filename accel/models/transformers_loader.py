"""Lets transformers load all checkpoints of hasten: importing this module registers the loader.

transformers 5.23 with compressed-tensors 0.20 loads packed layers in two ways, and each lacks something. Prepared
modules: not embeddings, for which its `_init_weights` needs a weight; not tied pairs; and not zero points. With the key
`dequantize`: all layers are read on the grid of the first config group. Here every tensor is unpacked by the scheme of
its own module while it is read, and transformers ties the unpacked weights. Checkpoints that transformers loads itself
are left to it.
"""

from typing import Any

import torch
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize, get_experts_scheme
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hasten.accel.models.experts_loading import missing_rules
from hasten.accel.models.packed import needs_loader

_METHOD = "compressed-tensors"


class _Unpack(CompressedTensorsDequantize):
    """Unpacks the tensors of a module, or of all experts of a layer, by the schemes of their config groups."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The weight by its name, from stored tensors by what follows the module's name.

        Of experts, their weights in one tensor for each projection, by the pattern of its name.
        """
        if any("*" in pattern for pattern in source_patterns):
            return self._experts(input_dict, source_patterns, str(full_layer_name), kwargs["model"])
        scheme = self.scheme
        if scheme is None and "weight_packed" in input_dict and full_layer_name is not None:
            scheme = self._scheme(full_layer_name.removesuffix(".weight"), kwargs["model"])
        unpack = CompressedTensorsDequantize(self.hf_quantizer, scheme)
        converted: dict[str, Any] = unpack.convert(
            input_dict, source_patterns, target_patterns, full_layer_name=full_layer_name, **kwargs
        )
        return converted

    def _experts(
        self, parts: dict[str, Any], patterns: list[str], fused_name: str, model: Any
    ) -> dict[str, torch.Tensor]:
        """fused_name: name of the parameter of all experts."""
        dtype = model.get_parameter(fused_name).dtype
        projections: dict[str, dict[str, Any]] = {}
        for pattern in patterns:
            if pattern in parts:
                projection, _, leaf = pattern.rpartition(".")
                projections.setdefault(projection, {})[leaf] = parts[pattern]
        weights = {}
        for projection, leaves in projections.items():
            number = len(next(iter(leaves.values())))
            module = fused_name.rpartition(".")[0]
            for expert in range(number):
                name = f"{module}.{expert}.{projection.rpartition('.')[2]}"
                stored = {leaf: tensors[expert] for leaf, tensors in leaves.items()}
                weight = self._expert(name, stored).to(dtype)
                key = f"{projection}.weight"
                if expert == 0:
                    # Filled one by one, so that the experts are not held twice.
                    weights[key] = torch.empty(number, *weight.shape, dtype=dtype, device=weight.device)
                weights[key][expert] = weight
        return weights

    def _expert(self, name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor

        if set(stored) == {"weight"}:
            return stored["weight"]
        config = self.hf_quantizer.compressor.quantization_config
        scheme = self._match(name, torch.nn.Linear(1, 1, device="meta")) or get_experts_scheme(config)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        weight: torch.Tensor = compressor.decompress(stored, scheme)["weight"]
        return weight

    def _scheme(self, name: str, model: Any) -> Any:
        return self._match(name, model.get_submodule(name))

    def _match(self, name: str, module: torch.nn.Module) -> Any:
        from compressed_tensors.utils.match import match_targets

        groups = self.hf_quantizer.compressor.quantization_config.config_groups.values()
        schemes = {target: group for group in groups for target in group.targets}
        targets = match_targets(name, module, list(schemes))
        return schemes[targets[0]] if targets else None


class Loader(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, which unpacks while loading where transformers alone fails."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        known = self.compressor.quantization_config
        self._unpacks = not quantization_config.dequantize and known is not None and needs_loader(known.model_dump())
        if self._unpacks:
            quantization_config.dequantize = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Unpack everything where transformers would not read the experts."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        if missing_rules(model, get_model_conversion_mapping(model)):
            self._unpacks = self.quantization_config.dequantize = True
        super()._process_model_before_weight_loading(model, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' rules for names, and those for experts that it lacks."""
        added = missing_rules(model, weight_conversions)
        conversions: list[Any] = super().update_weight_conversions([*weight_conversions, *added], model)
        return conversions

    def get_load_operations(self) -> dict[str, Any]:
        """The operation for checkpoint tensors."""
        return {"dequantize": _Unpack} if self._unpacks else super().get_load_operations()


AUTO_QUANTIZER_MAPPING[_METHOD] = Loader
