"""Mixtral and Qwen3-MoE: Llama with mixtures of experts for feed-forward networks, in all layers or in some of them."""

from hasten.accel.decoding.targets.families.decoder import RowMap
from hasten.accel.decoding.targets.families.feed_forward import Mixture
from hasten.accel.decoding.targets.families.llama import Llama
from hasten.accel.decoding.targets.families.weights import Rows


class Mixtral(Llama):
    """Mixtral."""

    data_dependent = True

    def mlp(self, index: int, name: str) -> RowMap:
        """A mixture."""
        return self.mixture(name, self.config.num_local_experts, normalizes=True, rounds=False)

    def mixture(self, name: str, number: int, normalizes: bool, rounds: bool) -> Mixture:
        """The mixture of experts of this name, see Mixture. number: of experts."""
        experts = [
            self.gated([Rows(f"{expert}.gate_proj"), Rows(f"{expert}.up_proj")], f"{expert}.down_proj")
            for expert in (f"{name}.experts.{index}" for index in range(number))
        ]
        router = self.weights.tensor(f"{name}.gate.weight")
        return Mixture(router, experts, self.config.num_experts_per_tok, normalizes, rounds)


class Qwen3Moe(Mixtral):
    """Qwen3-MoE."""

    def mlp(self, index: int, name: str) -> RowMap:
        """A mixture, or one network in some layers."""
        if not self.weights.has(f"{name}.gate.weight"):
            return super(Mixtral, self).mlp(index, name)
        return self.mixture(name, self.config.num_experts, self.config.norm_topk_prob, rounds=True)
