"""Linear layers of a trained network with the products that targets use, which are faster for few rows."""

from torch import Tensor, nn

from hasten.accel.decoding.targets.matmul import Weight


class FastLinear(nn.Module):
    """A linear layer that cannot be trained any more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = Weight(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self._outputs = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return self._weight(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self._outputs)


def use_fast_linears(network: nn.Module) -> None:
    """Replace the linear layers of a network on a CPU; elsewhere torch's own are as fast."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(module, name, FastLinear(child))
