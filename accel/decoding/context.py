"""The state of one sequence that is being decoded, which drafters and verifiers read."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hasten.accel.decoding.sampling import Sampling


@dataclass
class Context:
    """tokens: ids of the prompt, then all committed ids; the first prompt_length are the prompt.

    generator: random numbers of the verifier. draft_generator: those of the drafter. They are separate, so that with
    the sample-and-match verifier a seed gives the same text with every drafter. draws: whether drafters may draw tokens
    from their distributions; else they propose the most probable ones, because the verifier does not read
    distributions. state: per-sequence state of drafters; each drafter is the key of its own.
    """

    tokens: list[int]
    prompt_length: int
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator = field(default_factory=torch.Generator)
    draft_generator: torch.Generator = field(default_factory=torch.Generator)
    state: dict[Hashable, Any] = field(default_factory=dict)
    draws: bool = True

    @classmethod
    def start(cls, prompt: list[int], sampling: Sampling | None = None, seed: int = 0) -> "Context":
        """Context of a prompt, before the first token is decoded."""
        generators = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
        return cls(list(prompt), len(prompt), sampling or Sampling(), *generators)

    @property
    def drafting(self) -> Sampling:
        """Sampling parameters of drafts: the request's; those of temperature 0 if drafts are not drawn."""
        return self.sampling if self.draws else replace(self.sampling, temperature=0.0)


@contextmanager
def not_drawn(contexts: Sequence[Context]) -> Iterator[None]:
    """Let drafters propose most probable tokens for these sequences, instead of drawing them."""
    before = [context.draws for context in contexts]
    for context in contexts:
        context.draws = False
    try:
        yield
    finally:
        for context, draws in zip(contexts, before, strict=True):
            context.draws = draws
