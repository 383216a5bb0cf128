"""Perplexity of a model and its divergence from the original, with one block in memory at a time.

The divergence is KL(original || compressed) in nats per token: the loss that is added where the compressed model
predicts text that the original would write.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import Windows, windows
from hasten.accel.models.architecture import Architecture

# Bytes of each model's logits that are computed at once: more do not fit in the processor's cache, and sums over the
# vocabulary then take twice as long.
_LOGITS_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Sums:
    """Sums over scored tokens; sums over windows, actors and machines can be added.

    tokens: number of scored tokens. nll: negative log-likelihood of the model, nats. compared: number of tokens that
    the original predicted, too. Over the compared tokens: nll_original, the original's negative log-likelihood; kl,
    KL(original || model), nats; agreed, on how many both models rank the same token first.
    """

    tokens: int = 0
    nll: float = 0.0
    compared: int = 0
    nll_original: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def metrics(self) -> dict[str, float | int | None]:
        """Means by the report's keys; metrics of the comparison are None where there was no original."""
        compared = self.compared or None
        return {
            "perplexity": _perplexity(self.nll, self.tokens),
            "perplexity_original": compared and _perplexity(self.nll_original, compared),
            "kl_divergence": compared and self.kl / compared,
            "top1_agreement": compared and self.agreed / compared,
            "tokens": self.tokens,
        }


def evaluate(
    architecture: Architecture,
    tokens: Tensor | Windows,
    original: Architecture | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Sums:
    """Sums of a model over windows, compared with the original where one is given.

    tokens: windows, or token ids (N, T), each row of which is one window that scores all but its first token.
    batch: windows that run through a block at once. progress(done, total) is called after every block, and once more
    after the logits.
    Peak memory: the hidden states of all windows (of both models), the largest block and a few logits. The
    architectures keep their output layers until they are closed.
    Raises UserError where the two models have different vocabularies.
    """
    scored_windows = tokens if isinstance(tokens, Windows) else windows(tokens, tokens.shape[1])
    models = [architecture] if original is None else [architecture, original]
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if sizes[0] != sizes[-1]:
        raise UserError(
            f"the model's vocabulary has {sizes[0]} tokens and the original's {sizes[-1]}; "
            "only models of one vocabulary can be compared"
        )
    total = sum(model.num_blocks for model in models) + 1
    done = 0
    hidden = []
    for model in models:
        states = _embed(model, scored_windows.tokens, batch)
        for index in range(model.num_blocks):
            _run_block(model, index, states, batch)
            done += 1
            if progress is not None:
                progress(done, total)
        hidden.append(states)
    sums = _compare(models, hidden, scored_windows, max(1, _LOGITS_BYTES // (4 * sizes[0])))
    if progress is not None:
        progress(total, total)
    return sums


def _embed(model: Architecture, tokens: Tensor, batch: int) -> Tensor:
    """Hidden states (N, T, D) before the first block."""
    with torch.inference_mode():
        return torch.cat([model.embed(part) for part in tokens.split(batch)])


def _run_block(model: Architecture, index: int, states: Tensor, batch: int) -> None:
    """Run the states through one block, in place; the block is freed on return."""
    block = model.load_block(index)
    with torch.inference_mode():
        for part in states.split(batch):
            part.copy_(model.run_block(block, index, part))


def _compare(models: list[Architecture], hidden: list[Tensor], windows: Windows, chunk: int) -> Sums:
    """Sums from the last hidden states (N, T, D) of the model and, where there are two, of the original.

    chunk: number of tokens whose logits are computed at once.
    """
    rows, columns = windows.is_scored.nonzero(as_tuple=True)
    sums = Sums()
    with torch.inference_mode():
        for row, column in zip(rows.split(chunk), columns.split(chunk), strict=True):
            # The state at position t predicts token t + 1.
            states = [of_model[row, column - 1][None] for of_model in hidden]
            logits = [model.head(state)[0] for model, state in zip(models, states, strict=True)]
            sums += _sums(logits, windows.tokens[row, column])
    return sums


def _sums(logits: list[Tensor], targets: Tensor) -> Sums:
    """Sums over targets (M,) from logits (M, V) float32 of the model and, where there are two, the original."""
    targets = targets.to(logits[0].device)[:, None]
    model = logits[0].log_softmax(-1)
    nll = -float(model.gather(-1, targets).sum(dtype=torch.float64))
    if len(logits) == 1:
        return Sums(len(targets), nll)
    original = logits[1].to(model.device).log_softmax(-1)
    # Logits are finite, so all log probabilities are finite.
    kl = torch.linalg.vecdot(original.exp(), original - model)
    return Sums(
        tokens=len(targets),
        nll=nll,
        compared=len(targets),
        nll_original=-float(original.gather(-1, targets).sum(dtype=torch.float64)),
        kl=float(kl.sum(dtype=torch.float64)),
        agreed=int((model.argmax(-1) == original.argmax(-1)).sum()),
    )


def _perplexity(nll: float, tokens: int) -> float:
    if tokens == 0:
        raise ValueError("no token was scored")
    mean = nll / tokens
    return math.exp(mean) if not mean > 700 else math.inf  # exp of more than 709 overflows; nan stays nan
