"""Training of the acceptance head: on texts of which some tokens were replaced by draws of the draft model.

Source: Huang et al. 2024, arXiv:2405.19715 (SpecDec++), and its code, github.com/Kaffaljidhmah2/SpecDec_pp.
Departs from it: texts are given and not written by the target; hidden states are computed once and not every epoch, as
the draft model stays as it is; figures are measured with the weight on rejections taken out, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.training.heads.acceptance import AcceptanceHead

_BINS = 10


@dataclass(frozen=True)
class Examples:
    """hidden: (N, D), the draft model's last hidden states of drafted tokens. labels: (N,), their acceptance."""

    hidden: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class AcceptanceTraining:
    """Hyper-parameters. mixing: share of the text's own tokens that stay, all others are drawn by the draft model.

    reject_weight: of the loss on rejections, as they are rare. warmup: share of all steps with a rising learning rate,
    which then falls as a cosine. batch: examples a step.
    """

    blocks: int = 3
    mixing: float = 0.15
    reject_weight: float = 6.0
    epochs: int = 3
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.03
    batch: int = 256

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("blocks", self.blocks >= 0, "0 or more"),
            ("mixing", 0 <= self.mixing < 1, "from 0 and below 1"),
            ("reject_weight", self.reject_weight > 0, "above 0"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("warmup", 0 <= self.warmup <= 1, "from 0 to 1"),
            ("batch", self.batch >= 1, "1 or more"),
        ):
            if not right:
                raise UserError(f"{name}={getattr(self, name)} is wrong: expected {expected}")

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rate at one of so many steps."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (N, 2) with soft labels (N,), over the mass of its weights."""
        rejected, accepted = self.reject_weight * (1 - labels), labels
        log_probs = logits.float().log_softmax(-1)
        return -(rejected * log_probs[:, 0] + accepted * log_probs[:, 1]).sum() / (rejected + accepted).sum()

    def unweighted(self, predicted: Tensor) -> Tensor:
        """The acceptance that stands behind a prediction that was trained with the weight on rejections."""
        return self.reject_weight * predicted / (1 + (self.reject_weight - 1) * predicted)

    def collect(
        self,
        target: Any,
        draft: Any,
        tokens: Tensor,
        generator: torch.Generator,
        batch: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Examples:
        """Examples from windows tokens (S, T) int64; target, draft: transformers' causal LMs of one vocabulary.

        The models and the generator are on one device. So many windows run at once; what comes out is in the CPU's
        memory, in the draft's dtype. progress is told how many windows are done.
        """
        hidden, labels = [], []
        for start in range(0, len(tokens), batch):
            found = self._collect(target, draft, tokens[start : start + batch], generator)
            hidden.append(found.hidden)
            labels.append(found.labels)
            progress(min(start + batch, len(tokens)))
        return Examples(torch.cat(hidden), torch.cat(labels))

    @torch.no_grad()
    def _collect(self, target: Any, draft: Any, own: Tensor, generator: torch.Generator) -> Examples:
        own = own.to(draft.device)
        logits = [model(input_ids=own, use_cache=False).logits[:, :-1].float() for model in (target, draft)]
        # One model may have rows for ids that no tokenizer makes.
        shared = min(each.shape[-1] for each in logits)
        target_logits, draft_logits = (each[..., :shared] for each in logits)
        draft_probs = draft_logits.softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(draft_probs, 1, generator=generator).view(own.shape[0], -1, 1)
        target_log, draft_log = (
            (each.gather(-1, drawn) - each.logsumexp(-1, keepdim=True))[..., 0]
            for each in (target_logits, draft_logits)
        )
        drawn = drawn[..., 0]
        stays = torch.rand(drawn.shape, generator=generator, device=own.device) < self.mixing
        mixed = torch.cat([own[:, :1], torch.where(stays, own[:, 1:], drawn)], 1)
        out = draft(input_ids=mixed, use_cache=False, output_hidden_states=True)
        labels = (target_log - draft_log).clamp(max=0).exp()
        return Examples(out.hidden_states[-1][:, 1:][~stays].cpu(), labels[~stays].cpu())

    def steps(self, examples: int) -> int:
        """Steps of the whole training on so many examples."""
        return self.epochs * math.ceil(examples / self.batch)

    def fit(
        self,
        examples: Examples,
        seed: int = 0,
        device: str = "cpu",
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> AcceptanceHead:
        """The trained head, in float32, on the CPU; report(step, loss) after every step."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = AcceptanceHead(examples.hidden.shape[-1], self.blocks).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = self.steps(len(examples))
        step = 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(examples), generator=generator).split(self.batch):
                for part in optimizer.param_groups:
                    part["lr"] = self.lr * self.rate(step, steps)
                hidden, labels = (each[rows].to(device) for each in (examples.hidden, examples.labels))
                loss = self.loss(head(hidden.float()), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                report(step, loss.item())
        return head.cpu().eval()

    def measure(self, head: AcceptanceHead, examples: Examples) -> "Quality":
        """What a head is worth on examples that it was not trained on."""
        with torch.no_grad():
            logits = torch.cat([head(part.float()) for part in examples.hidden.split(4096)])
        labels, predicted = examples.labels.double(), logits.float().softmax(-1)[:, 1].double()
        plain = self.unweighted(predicted)
        bins = (plain * _BINS).long().clamp(max=_BINS - 1)
        table = []
        for index in range(_BINS):
            here = bins == index
            if here.any():
                means = {"predicted": predicted[here], "unweighted": plain[here], "accepted": labels[here]}
                table.append({"tokens": int(here.sum())} | {name: float(each.mean()) for name, each in means.items()})
        entropy = -(labels * plain.log() + (1 - labels) * (1 - plain).log()).mean()
        return Quality(
            float(self.loss(logits, examples.labels)),
            float(entropy),
            auc(predicted, labels),
            auc(labels, labels),
            float(labels.mean()),
            float((plain - labels).abs().mean()),
            table,
        )


@dataclass(frozen=True)
class Quality:
    """loss: the weighted one that is trained on. cross_entropy: without weights, of the unweighted prediction.

    auc: chance that of an accepted and a rejected token the accepted one has the higher prediction; auc_best: that of
    the acceptance itself as a prediction. accepted: mean acceptance. error: mean distance of the unweighted prediction
    from it. calibration: tokens by tenths of the unweighted prediction, with the means of prediction, unweighted
    prediction and acceptance.
    """

    loss: float
    cross_entropy: float
    auc: float
    auc_best: float
    accepted: float
    error: float
    calibration: list[dict[str, float]]


def auc(predicted: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve where a label (N,) is the share of a row that is positive; equal predictions count half.

    nan where all rows are of one kind.
    """
    _, places = predicted.unique(return_inverse=True)
    positive = torch.zeros(int(places.max()) + 1, dtype=torch.float64).index_add_(0, places, labels.double())
    negative = torch.zeros_like(positive).index_add_(0, places, 1 - labels.double())
    below = negative.cumsum(0) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")
