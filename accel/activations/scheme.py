"""How the inputs of a layer are rounded before its product, in the terms of compressed-tensors' QuantizationArgs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputScheme:
    """Grid of a layer's inputs [..., C].

    kind: `int`, or `float` (8 bits is FP8 e4m3, 4 bits is FP4 e2m1). strategy: what shares a scale; `tensor` all
    inputs, `token` the inputs of a token, `group` group_size consecutive inputs of a token, `tensor_group` the same
    with FP8 scales under one global scale of the layer (NVFP4). static: the scale of `tensor` is calibrated; other
    scales are computed from the inputs themselves, but for the global scale, which always is calibrated. scale:
    `plain` in the checkpoint's dtype, `fp8`, or `power_of_two` (the microscaling formats). symmetric: without a zero
    point; hasten writes no other inputs, but reads them.
    """

    kind: str
    bits: int
    strategy: str
    group_size: int | None = None
    static: bool = False
    scale: str = "plain"
    symmetric: bool = True

    @property
    def is_calibrated(self) -> bool:
        """Whether a scale of the layer must be calibrated."""
        return self.static or self.strategy == "tensor_group"

    @property
    def top(self) -> float:
        """Largest magnitude of a code on both sides of zero."""
        return {8: 448.0, 4: 6.0}[self.bits] if self.kind == "float" else 2.0 ** (self.bits - 1) - 1
