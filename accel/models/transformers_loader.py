"""Lets transformers load all checkpoints of hasten: importing this module registers the loader.

transformers 5.23 with compressed-tensors 0.20 loads packed layers in two ways, and each lacks something. Prepared
modules: not embeddings, for which its `_init_weights` needs a weight; not tied pairs; and not zero points. With the key
`dequantize`: all layers are read on the grid of the first config group. Here every tensor is unpacked by the scheme of
its own module while it is read, and transformers ties the unpacked weights. Checkpoints that transformers loads itself
are left to it.
"""

from typing import Any

from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hasten.accel.models.packed import needs_loader

_METHOD = "compressed-tensors"


class _Unpack(CompressedTensorsDequantize):
    """Unpacks the tensors of a module by the scheme of its config group."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The weight by its name, from stored tensors by what follows the module's name."""
        scheme = self.scheme
        if scheme is None and "weight_packed" in input_dict and full_layer_name is not None:
            scheme = self._scheme(full_layer_name.removesuffix(".weight"), kwargs["model"])
        unpack = CompressedTensorsDequantize(self.hf_quantizer, scheme)
        converted: dict[str, Any] = unpack.convert(
            input_dict, source_patterns, target_patterns, full_layer_name=full_layer_name, **kwargs
        )
        return converted

    def _scheme(self, name: str, model: Any) -> Any:
        from compressed_tensors.utils.match import match_targets

        groups = self.hf_quantizer.compressor.quantization_config.config_groups.values()
        schemes = {target: group for group in groups for target in group.targets}
        targets = match_targets(name, model.get_submodule(name), list(schemes))
        return schemes[targets[0]] if targets else None


class Loader(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, which unpacks while loading where transformers alone fails."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        known = self.compressor.quantization_config
        self._unpacks = not quantization_config.dequantize and known is not None and needs_loader(known.model_dump())
        if self._unpacks:
            quantization_config.dequantize = True

    def get_load_operations(self) -> dict[str, Any]:
        """The operation for checkpoint tensors."""
        return {"dequantize": _Unpack} if self._unpacks else super().get_load_operations()


AUTO_QUANTIZER_MAPPING[_METHOD] = Loader
