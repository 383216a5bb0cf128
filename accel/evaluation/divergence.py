"""Perplexity of a model and its divergence from the original, with one block in memory at a time.

The divergence is KL(original || compressed) in nats per token: the loss that is added where the compressed model
predicts text that the original would write.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.evaluation.online_softmax import Divergence, LogSumExp, MostLikely, PickedLogits
from hasten.accel.evaluation.perplexity import Windows, part_of, windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.forwards import Forward
from hasten.accel.models.output_layer import TILE_TOKENS, OutputLayer


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
    share: tuple[int, int] = (0, 1),
) -> Sums:
    """Sums of a model over windows, compared with the original where one is given.

    tokens: windows, or token ids (N, T), each row of which is one window that scores all but its first token.
    batch: windows that run through a block at once. progress(done, total) is called after every block, and once more
    after the logits. share: (i, n) to score only part i of n parts of the windows, after running all of them: for
    processes that run the blocks together, in which each of them computes a part of every layer.
    Peak memory: the hidden states of all windows (of both models), the largest block and a few logits. The output
    layers are read once, a tile of the vocabulary at a time, and are not kept.
    Raises UserError where the two models have different vocabularies.
    """
    all_windows = tokens if isinstance(tokens, Windows) else windows(tokens, tokens.shape[1])
    scored_windows = all_windows.part(*share)
    own = part_of(len(all_windows), *share)
    models = [architecture] if original is None else [architecture, original]
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if sizes[0] != sizes[-1]:
        raise UserError(
            f"the model's vocabulary has {sizes[0]} tokens and the original's {sizes[-1]}; "
            "only models of one vocabulary can be compared"
        )
    total = sum(model.num_blocks for model in models) + 1
    done = 0
    layers = [model.streamed_output_layer() for model in models]
    inputs = []
    for model, layer in zip(models, layers, strict=True):
        states = _embed(model, all_windows.tokens, batch)
        for index in range(model.num_blocks):
            _run_block(model, index, states, batch)
            done += 1
            if progress is not None:
                progress(done, total)
        inputs.append(_output_inputs(layer, states[own], scored_windows))
        del states
    sums = _output_sums(layers, inputs, scored_windows.tokens[scored_windows.is_scored])
    if progress is not None:
        progress(total, total)
    return sums


def _embed(model: Architecture, tokens: Tensor, batch: int) -> Tensor:
    """Hidden states (N, T, D) before the first block."""
    with torch.inference_mode():
        return torch.cat([model.embed(part) for part in tokens.split(batch)])


def _run_block(model: Architecture, index: int, states: Tensor, batch: int) -> None:
    """Run the states through one block, in place; the block is freed on return."""
    block = model.stream_block(index)
    with torch.inference_mode():

        def run(part: Tensor) -> None:
            part.copy_(model.run_block(block, index, part))

        parts = states.split(batch) if len(states) else ()
        for lot in model.lots(index, parts):
            model.run_forwards(block, [Forward(partial(run, parts[place])) for place in lot])


def _output_inputs(layer: OutputLayer, states: Tensor, windows: Windows) -> Tensor:
    """Inputs of the output matrix that predict the M scored tokens, (M, D'), from the last hidden states (N, T, D)."""
    rows, columns = windows.is_scored.nonzero(as_tuple=True)
    inputs = states.new_empty(len(rows), layer.width)
    for part, row, column in zip(
        inputs.split(TILE_TOKENS), rows.split(TILE_TOKENS), columns.split(TILE_TOKENS), strict=True
    ):
        # The state at position t predicts token t + 1.
        part.copy_(layer.inputs(states[row, column - 1]))
    return inputs


def _output_sums(layers: list[OutputLayer], inputs: list[Tensor], targets: Tensor) -> Sums:
    """Sums over targets (M,). layers and inputs (M, D') of the model and, where there are two, of the original."""
    if not len(targets):
        return Sums()
    lots = zip(*(of_model.split(TILE_TOKENS) for of_model in inputs), strict=True)
    parts = [
        _RunningSums(lot, target)
        for lot, target in zip(lots, targets.to(inputs[0].device).split(TILE_TOKENS), strict=True)
    ]
    # Tiles outside, tokens inside: every part of the output matrices is read and converted once.
    for first, last in layers[0].spans(min(TILE_TOKENS, len(targets))):
        weights = [layer.weight(first, last) for layer in layers]
        for part in parts:
            part.add(
                first,
                [layer.logits(x, w, first) for layer, x, w in zip(layers, part.inputs, weights, strict=True)],
            )
    return sum((part.sums() for part in parts), Sums())


class _RunningSums:
    """Sums over a few tokens, of which one tile of the vocabulary is seen at a time.

    inputs: of the output matrix, (M, D') of the model and, where there are two, of the original. targets: (M,).
    """

    def __init__(self, inputs: Sequence[Tensor], targets: Tensor) -> None:
        rows, device = len(targets), targets.device
        self.inputs = inputs
        self._divergence = Divergence(rows, device) if len(inputs) == 2 else None
        self._normalizers = (
            [self._divergence.model, self._divergence.original] if self._divergence else [LogSumExp(rows, device)]
        )
        self._targets = [PickedLogits(targets[:, None]) for _ in inputs]
        self._likeliest = [MostLikely(rows, device) for _ in inputs]

    def add(self, first: int, logits: list[Tensor]) -> None:
        """Add a tile that begins with entry `first`; logits: (M, C) of the model and the original."""
        if self._divergence is None:
            self._normalizers[0].add(logits[0])
        else:
            self._divergence.add(original=logits[1], model=logits[0])
        for tile, picked, likeliest, normalizer in zip(
            logits, self._targets, self._likeliest, self._normalizers, strict=True
        ):
            picked.add(first, tile)
            if self._divergence is not None:
                likeliest.add(first, tile, normalizer.maximum)

    def sums(self) -> Sums:
        """Sums after the last tile."""
        nll = [
            float((normalizer.value() - picked.value()[:, 0]).sum())
            for normalizer, picked in zip(self._normalizers, self._targets, strict=True)
        ]
        tokens = len(self.inputs[0])
        if self._divergence is None:
            return Sums(tokens, nll[0])
        return Sums(
            tokens=tokens,
            nll=nll[0],
            compared=tokens,
            nll_original=nll[1],
            kl=float(self._divergence.value().sum()),
            agreed=int((self._likeliest[0].entry == self._likeliest[1].entry).sum()),
        )


def _perplexity(nll: float, tokens: int) -> float:
    if tokens == 0:
        raise ValueError("no token was scored")
    mean = nll / tokens
    return math.exp(mean) if not mean > 700 else math.inf  # exp of more than 709 overflows; nan stays nan
