"""Fewer KV heads: neighbouring heads of keys and of values become one, and the projections around them change, too.

Source: Yu et al. 2024, arXiv:2406.07056, read from its abstract and summaries: the keys (values) of a group of heads on
calibration text are decomposed by their singular values, and the first directions are kept; those of values are folded
into the projections of values and of the output.
Departs from it: there, keys are compressed before their rotary embedding and restored while the model runs, which no
loader does. Here the two numbers that a rotary embedding turns together are one complex number, and what multiplies it
with another complex number commutes with the embedding. So in each of these planes the keys of a group become one
number, along the first singular direction of theirs, and each query head is multiplied with its head's part of the
direction. The result is a model of the same family. It is not fine-tuned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.full import Full
from hasten.accel.errors import UserError

KEYS = ("directions", "mean")


@dataclass(frozen=True)
class KVHeads(Full, Calibrated):
    """What is summed over calibration text, and what a layer's heads become.

    group: heads that become one. keys: directions, or the mean of the heads, with which GQA is initialised; values are
    the first directions in either case.
    """

    group: int = 2
    keys: str = "directions"

    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"group={self.group} is out of range: 2 or more")
        if self.keys not in KEYS:
            raise UserError(f"keys={self.keys} is none of {', '.join(KEYS)}")

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Second moments of a group's values (N, g D, g D), and of its keys in each plane (N, D / 2, g, g), complex."""
        keys, values = (
            part.double().unflatten(0, (-1, self.group)) for part in (tokens.unrotated(tokens.keys), tokens.values)
        )
        joined = values.transpose(1, 2).flatten(2)  # (N, T, g D)
        numbers = torch.complex(*keys.chunk(2, -1)).permute(0, 3, 1, 2)  # (N, D / 2, g, T)
        moments = numbers @ numbers.mH
        return {"values": joined.mT @ joined, "real": moments.real.clone(), "imaginary": moments.imag.clone()}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """Directions of values (N, D, g D), and matrices of the heads' keys and of their queries (N, g, D, D)."""
        solved = []
        for own in layers:
            size = own["values"].shape[1] // self.group
            directions = torch.linalg.eigh(own["values"]).eigenvectors.flip(2)[..., :size].mT.contiguous()
            numbers = torch.linalg.eigh(torch.complex(own["real"], own["imaginary"])).eigenvectors[..., -1].mT
            if self.keys == "mean":
                ones = torch.ones_like(numbers)
                solved.append({"v": directions, "k": _turning(ones / self.group), "q": _turning(ones)})
                continue
            # Only the angles between the heads count: keys of the first head are not turned.
            first = numbers[:, :1]
            turning = _turning(numbers * first.conj() / first.abs().clamp(min=1e-12))
            solved.append({"v": directions, "k": turning, "q": turning})
        return solved


def _turning(numbers: Tensor) -> Tensor:
    """Matrices (N, g, D, D) that multiply each plane of a head with the conjugate of its number (N, g, D / 2)."""
    real, imaginary = torch.diag_embed(numbers.real), torch.diag_embed(numbers.imag)
    return torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)


def folded(weights: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections of a layer with fewer heads. weights: q, k, v (R, C) or their biases (R,), and o (R, C).

    statistics: see KVHeads.solve.
    """
    groups, heads, size = statistics["k"].shape[:3]
    result = {}
    for name, weight in weights.items():
        rows = weight.double()
        if name == "q":
            # The query heads of a KV head follow each other.
            own = rows.unflatten(0, (groups, heads, -1, size))
            turned = torch.einsum("nhde,nhqe...->nhqd...", statistics["q"], own).flatten(0, 3)
        elif name == "k":
            own = rows.unflatten(0, (groups, heads, size))
            turned = torch.einsum("nhde,nhe...->nd...", statistics["k"], own).flatten(0, 1)
        elif name == "v":
            own = rows.unflatten(0, (groups, heads * size))
            turned = torch.einsum("nde,ne...->nd...", statistics["v"], own).flatten(0, 1)
        else:
            own = rows.unflatten(1, (groups, heads, -1, size))
            turned = torch.einsum("cnhqe,ndhe->cnhqd", own, statistics["v"].unflatten(2, (heads, size))).flatten(1)
        result[name] = turned.to(weight.dtype).contiguous()
    return result
