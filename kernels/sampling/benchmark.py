"""Benchmark cases of sampling: vocabularies of common models, one row and a batch, top-k, top-p and both."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.sampling import reference, triton_kernel
from hasten.kernels.timing import Case, Operands

_SHAPES = [(1, 128_256), (64, 128_256), (64, 151_936)]
_DRY_SHAPES = [(1, 300)]
_SETTINGS = {"top_k=50": (1.0, 50, 1.0), "top_p=0.95": (0.8, 0, 0.95), "top_k=50,top_p=0.9": (0.8, 50, 0.9)}
# Standard deviation of the logits: about that of a language model.
_SPREAD = 4.0


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxVOCABULARY, and setting."""
    for rows, vocabulary in _DRY_SHAPES if dry else _SHAPES:
        # One setting in a dry run: a bisection takes a second in Triton's interpreter.
        for name, setting in list(_SETTINGS.items())[-1 if dry else 0 :]:
            yield Case(
                op="sampling",
                shape=f"{rows}x{vocabulary} {name}",
                dtype="float32",
                device_type=device.type,
                operands=partial(_operands, rows, vocabulary, setting),
                kernel=triton_kernel.sample,
                reference=reference.sample,
                # Logits are read once more than the floor counts: their order is not known before.
                nbytes=rows * vocabulary * 4,
                flops=0,
                peers={"torch": _peer(setting)},
            )


def _operands(
    rows: int,
    vocabulary: int,
    setting: tuple[float, int, float],
    generator: torch.Generator,
    device: torch.device,
) -> Operands:
    logits = _SPREAD * torch.randn(rows, vocabulary, generator=generator, device=device)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64, device=device)
    return logits, uniform, *(torch.full((rows,), value, device=device) for value in setting)


def _peer(setting: tuple[float, int, float]) -> Callable[..., Tensor]:
    """What decoding without the kernel does: topk or sort, softmax and multinomial in float32."""
    temperature, top_k, top_p = setting

    def peer(logits: Tensor, *_: Tensor) -> Tensor:
        scaled = logits / temperature
        if top_k:
            scaled, order = scaled.topk(top_k, -1)
        else:
            scaled, order = scaled.sort(-1, descending=True)
        probs = scaled.softmax(-1)
        if top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
        return order.gather(-1, probs.multinomial(1))

    return peer
