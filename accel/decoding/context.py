"""One sequence that is being decoded, as drafters and verifiers see it."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from hasten.accel.decoding.sampling import Sampling


@dataclass
class Context:
    """tokens: the prompt's ids and all that were committed since; prompt_length of them are the prompt.

    generator: of the verifier. draft_generator: of the drafter; apart, so that with the sample-and-match verifier a
    seed gives the same text whatever the drafter. state: what drafters keep of this sequence, each under its own key.
    """

    tokens: list[int]
    prompt_length: int
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator = field(default_factory=torch.Generator)
    draft_generator: torch.Generator = field(default_factory=torch.Generator)
    state: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, prompt: list[int], sampling: Sampling | None = None, seed: int = 0) -> "Context":
        """A sequence of which nothing was decoded yet."""
        generators = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
        return cls(list(prompt), len(prompt), sampling or Sampling(), *generators)
