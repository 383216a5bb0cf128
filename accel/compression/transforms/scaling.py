"""Base class of transforms that scale the input channels of layers, folded into what makes the channels."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.transforms.base import BlockTransform, BlockView, GroupInputs, Part
from hasten.accel.compression.transforms.edits import Edit, Edits, Replace, ScaleColumns, ScaleRows
from hasten.accel.models.scale_sites import NORM, ScaleSite


@dataclass(frozen=True)
class SiteInputs:
    """A site, and the compressed groups that read it, each with the statistics of its input.

    Every expert is a group of its own, whose input is a part of the tokens.
    """

    site: ScaleSite
    groups: Sequence[tuple[Group, GroupInputs]]

    def mean(self) -> Tensor:
        """Mean magnitude of every channel of the source over the tokens of all groups, (S,) float32."""
        tokens = sum(inputs.tokens for _, inputs in self.groups)
        mean = torch.stack([inputs.mean() * (inputs.tokens / tokens) for _, inputs in self.groups]).sum(0)
        return self.site.reduced(mean, lambda values: values.mean(-1))

    def peak(self) -> Tensor:
        """Largest magnitude of every channel of the source, (S,) float32."""
        peak = torch.stack([inputs.peak() for _, inputs in self.groups]).amax(0)
        return self.site.reduced(peak, lambda values: values.amax(-1))


@dataclass(frozen=True)
class ScalingTransform(BlockTransform):
    """A transform that chooses a scale of each channel, at one site after the other; sites do not depend on each other.

    Layers that share an input share its scales.
    """

    needs_statistics: ClassVar[bool] = True

    @abstractmethod
    def scale(self, view: BlockView, inputs: SiteInputs) -> Tensor | None:
        """Scales (S,) float32, positive, by which the weights' columns are multiplied; None leaves the site as it is.

        S is the number of the source's channels, see ScaleSite.expanded.
        """

    def sites(self, view: BlockView) -> list[ScaleSite]:
        """The sites that are scaled."""
        return view.sites

    def parts(self, view: BlockView) -> list[Part]:
        """A part for each site."""
        parts = []
        for site in self.sites(view):
            groups = view.groups_of(site)
            rows = sum(layer.rows for group in groups for layer in group.layers)
            parts.append(Part(site.key, tuple(group.key for group in groups), float(rows) * site.channels**2))
        return parts

    def edits(self, view: BlockView, key: str) -> Edits:
        """The scales of a site, folded."""
        site = next(site for site in self.sites(view) if site.key == key)
        read = [(group, view.inputs(group)) for group in view.groups_of(site)]
        groups = [(group, inputs) for group, inputs in read if inputs is not None]
        scale = self.scale(view, SiteInputs(site, groups)) if groups else None
        return {} if scale is None else folded(view, site, scale)


def folded(view: BlockView, site: ScaleSite, scale: Tensor) -> Edits:
    """Edits that multiply the columns of all readers of a site by a scale (S,), and divide the channels by it."""
    edits: dict[str, list[Edit]] = {}
    scale = scale.float().cpu()
    weight, *bias = site.source
    if site.kind == NORM:
        # The scale is adjusted to the norm's weight as it is stored, so that rounding it changes no output.
        factor = view.tensor(weight).cpu() + site.offset
        value = (factor / scale - site.offset).to(view.checkpoint.dtype(weight))
        stored = value.float() + site.offset
        exact = factor / stored
        usable = torch.isfinite(exact) & (exact > 0)
        scale = torch.where(usable, exact, 1.0)
        value = torch.where(usable, value, (factor - site.offset).to(value.dtype))
        edits[weight] = [Replace(value)]
    else:
        edits[weight] = [ScaleRows(1 / scale, site.first)]
    for name in bias:
        edits[name] = [ScaleRows(1 / scale, site.first)]
    columns = ScaleColumns(site.expanded(scale).contiguous())
    for name in [*(f"{layer.name}.weight" for layer in site.layers), *site.readers]:
        edits.setdefault(name, []).append(columns)
    return edits
