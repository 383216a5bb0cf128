"""Statistics of speculative decoding, under vLLM's names."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hasten.accel.decoding.drafters.base import Outcome


@dataclass
class DecodingStats:
    """Statistics of one sequence, or the sum over several.

    num_spec_steps: passes of the target. histogram: number of passes by accepted draft tokens. drafted_at,
    accepted_at: number of passes that drafted, and that accepted, a node at each depth; the first item is depth 1.
    """

    num_tokens: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    verify_seconds: float = 0.0

    def add(
        self, outcome: Outcome, tokens: int, draft_seconds: float, target_seconds: float, verify_seconds: float
    ) -> None:
        """Count one pass, which added `tokens` tokens to a sequence."""
        accepted = len(outcome.path)
        self.num_tokens += tokens
        self.num_spec_steps += 1
        self.num_draft_tokens += len(outcome.tree)
        self.num_accepted_draft_tokens += accepted
        self.histogram[accepted] = self.histogram.get(accepted, 0) + 1
        deepest = max(outcome.tree.depths, default=0)
        for counts, depth in ((self.drafted_at, deepest), (self.accepted_at, accepted)):
            counts += [0] * (depth - len(counts))
            for index in range(depth):
                counts[index] += 1
        self.draft_seconds += draft_seconds
        self.target_seconds += target_seconds
        self.verify_seconds += verify_seconds

    @classmethod
    def total(cls, parts: Iterable["DecodingStats"]) -> "DecodingStats":
        """Sum over sequences."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                current = getattr(total, name)
                if isinstance(value, dict):
                    for key, count in value.items():
                        current[key] = current.get(key, 0) + count
                elif isinstance(value, list):
                    current += [0] * (len(value) - len(current))
                    for index, count in enumerate(value):
                        current[index] += count
                else:
                    setattr(total, name, current + value)
        return total

    def metrics(self) -> dict[str, float]:
        """Statistics under vLLM's names; mean_acceptance_length is tokens a pass, with the one that the pass yields."""
        steps, drafted = self.num_spec_steps, self.num_draft_tokens
        spent = self.draft_seconds + self.target_seconds + self.verify_seconds
        shares = {
            f"{name}_share": getattr(self, f"{name}_seconds") / spent if spent else 0.0
            for name in ("draft", "target", "verify")
        }
        return {
            "num_tokens": self.num_tokens,
            "num_spec_steps": steps,
            "num_draft_tokens": drafted,
            "num_accepted_draft_tokens": self.num_accepted_draft_tokens,
            # Not 1 + accepted / steps: a pass that accepts a stop token yields no further one.
            "mean_acceptance_length": self.num_tokens / steps if steps else 0.0,
            "draft_acceptance_rate": self.num_accepted_draft_tokens / drafted if drafted else 0.0,
            "tokens_per_second": self.num_tokens / spent if spent else 0.0,
            **shares,
        }

    @property
    def acceptance_histogram(self) -> list[int]:
        """Number of passes that accepted 0, 1, 2, … draft tokens."""
        return [self.histogram.get(count, 0) for count in range(max(self.histogram, default=-1) + 1)]

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of all passes that accepted a token at depth 1, 2, …."""
        return [count / self.num_spec_steps for count in self.accepted_at]
