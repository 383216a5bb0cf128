"""SmoothQuant: move the outliers of activations into the weights, so that both can be quantized.

Source: Xiao et al. 2022, arXiv:2211.10438, equation 4: the input of channel j is divided by s_j = max|x_j|^a /
max|w_j|^(1-a), and its weights are multiplied by it.
Departs from it: layers behind other linear layers (attention's output, the second layer of a feed-forward network) can
be smoothed, too, with all_layers=true.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.transforms.base import BlockView
from hasten.accel.compression.transforms.scaling import ScalingTransform, SiteInputs
from hasten.accel.errors import UserError
from hasten.accel.models.scale_sites import NORM, ScaleSite

_LEAST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(ScalingTransform):
    """Scales from the largest magnitudes of inputs and weights.

    strength: how much of the range moves from the inputs to the weights, 0.5 in the paper, 0.8 for models with larger
    outliers. all_layers: whether layers that do not follow a norm are smoothed, too.
    """

    strength: float = 0.5
    all_layers: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"transform.smoothquant.strength={self.strength:g} is out of range: 0 to 1")

    def sites(self, view: BlockView) -> list[ScaleSite]:
        """Sites behind norms, or all."""
        return [site for site in view.sites if self.all_layers or site.kind == NORM]

    def scale(self, view: BlockView, inputs: SiteInputs) -> Tensor:
        """Equation 4, over all layers that read the input; 1 for channels that are always zero."""
        peaks = [view.tensor(f"{layer.name}.weight").abs().amax(0) for layer in inputs.site.layers]
        weights = inputs.site.reduced(torch.stack(peaks).amax(0), lambda values: values.amax(-1))
        activations = inputs.peak()
        scale = activations.clamp(min=_LEAST) ** self.strength / weights.clamp(min=_LEAST) ** (1 - self.strength)
        return torch.where(activations > 0, scale.clamp(min=_LEAST), 1.0)
