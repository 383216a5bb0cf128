"""Linear layers and norms of a trained network as targets have them, which are faster for few rows."""

from torch import Tensor, nn

from hasten.accel.decoding.targets.matmul import Norm, Weight


class FastLinear(nn.Module):
    """A linear layer that cannot be trained any more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = Weight(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self._outputs = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return self._weight(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self._outputs)


class FastNorm(nn.Module):
    """A root mean square norm that cannot be trained any more."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self._norm = Norm(norm.weight.detach(), norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return self._norm(x)


def use_fast_modules(network: nn.Module) -> None:
    """Replace the linear layers and norms of a network on a CPU; elsewhere torch's own are as fast."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(module, name, FastLinear(child))
            elif type(child) is nn.RMSNorm and child.weight.device.type == "cpu":
                setattr(module, name, FastNorm(child))
