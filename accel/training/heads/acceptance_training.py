"""Training of the acceptance head of SpecDec++: on texts of which some tokens were replaced by the draft model's.

Source: Huang et al. 2024, arXiv:2405.19715 (SpecDec++), and its code, github.com/Kaffaljidhmah2/SpecDec_pp.
Departs from it: texts are given and not written by the target; hidden states are computed once and not every epoch, as
the draft model stays as it is; quality is measured with the weight on rejections taken out, too.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.errors import UserError
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.accel.training.heads.base import Head, HeadModels, HeadQuality
from hasten.accel.training.heads.fitting import Fitting

_BINS = 10


@dataclass(frozen=True)
class Examples:
    """hidden: (N, D), the draft model's last hidden states of drafted tokens. labels: (N,), their acceptance."""

    hidden: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class AcceptanceQuality(HeadQuality):
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

    def metrics(self) -> dict[str, float]:
        """All fields but the calibration."""
        return {name: value for name, value in asdict(self).items() if name != "calibration"}

    def tables(self) -> dict[str, list[dict[str, float]]]:
        """The calibration."""
        return {"calibration": self.calibration}

    def summary(self) -> list[str]:
        """Loss and AUC, and the calibration as a table."""
        return [
            f"held-out loss {self.loss:.4f}, AUC {self.auc:.3f} of at most {self.auc_best:.3f}; of the drafted tokens "
            f"{self.accepted:.1%} are accepted",
            "tokens    predicted  weight out  accepted",
            *(
                f"{row['tokens']:<9} {row['predicted']:<10.3f} {row['unweighted']:<11.3f} {row['accepted']:.3f}"
                for row in self.calibration
            ),
        ]


@dataclass(frozen=True)
class AcceptanceTraining(Head[Examples, AcceptanceHead]):
    """Acceptance head of `blocks` residual blocks. mixing: share of the text's own tokens that stay; others are drawn.

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
    drafter: ClassVar[str] = "specdec_pp"
    file: ClassVar[str] = FILE

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("blocks", self.blocks >= 0, "0 or more"),
            ("mixing", 0 <= self.mixing < 1, "from 0 and below 1"),
            ("reject_weight", self.reject_weight > 0, "above 0"),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} is wrong: expected {expected}")
        _ = self._fitting  # checks the other fields

    @property
    def _fitting(self) -> Fitting:
        return Fitting(self.epochs, self.lr, self.batch, self.weight_decay, self.warmup)

    def parameters(self, hidden_size: int) -> int:
        """Of the blocks, and of the layer with two outputs."""
        return self.blocks * (hidden_size + 1) * hidden_size + 2 * hidden_size + 2

    @property
    def examples_per_token(self) -> float:
        """All tokens that the draft model drew."""
        return 1 - self.mixing

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
        models: HeadModels,
        tokens: Tensor,
        generator: torch.Generator,
        batch: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Examples:
        """Hidden states in the draft's dtype, and their labels in float32."""
        assert models.draft is not None
        hidden, labels = [], []
        for start in range(0, len(tokens), batch):
            examples = self._collect(models.target, models.draft, tokens[start : start + batch], generator)
            hidden.append(examples.hidden)
            labels.append(examples.labels)
            progress(min(start + batch, len(tokens)))
        return Examples(torch.cat(hidden), torch.cat(labels))

    @torch.no_grad()
    def _collect(
        self, target: PreTrainedModel, draft: PreTrainedModel, own: Tensor, generator: torch.Generator
    ) -> Examples:
        own = own.to(draft.device)
        logits = [model(input_ids=own, use_cache=False).logits[:, :-1].float() for model in (target, draft)]
        # One model may have rows for ids that no tokenizer makes.
        shared = min(scores.shape[-1] for scores in logits)
        target_logits, draft_logits = (scores[..., :shared] for scores in logits)
        draft_probs = draft_logits.softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(draft_probs, 1, generator=generator).view(own.shape[0], -1, 1)
        target_log, draft_log = (
            (scores.gather(-1, drawn) - scores.logsumexp(-1, keepdim=True))[..., 0]
            for scores in (target_logits, draft_logits)
        )
        drawn = drawn[..., 0]
        stays = torch.rand(drawn.shape, generator=generator, device=own.device) < self.mixing
        mixed = torch.cat([own[:, :1], torch.where(stays, own[:, 1:], drawn)], 1)
        out = draft(input_ids=mixed, use_cache=False, output_hidden_states=True)
        labels = (target_log - draft_log).clamp(max=0).exp()
        return Examples(out.hidden_states[-1][:, 1:][~stays].cpu(), labels[~stays].cpu())

    def steps(self, examples: int) -> int:
        """As many as its epochs take."""
        return self._fitting.steps(examples)

    def fit(
        self,
        examples: Examples,
        seed: int = 0,
        device: str = "cpu",
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> AcceptanceHead:
        """A head from random weights, which the seed decides, too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = AcceptanceHead(examples.hidden.shape[-1], self.blocks)

        def loss(hidden: Tensor, labels: Tensor) -> Tensor:
            return self.loss(head(hidden.float()), labels)

        self._fitting.run(head, (examples.hidden, examples.labels), loss, seed, device, report)
        return head.cpu().eval()

    def measure(self, network: AcceptanceHead, examples: Examples) -> AcceptanceQuality:
        """With the weight on rejections in the loss, and taken out of the prediction elsewhere."""
        with torch.no_grad():
            logits = torch.cat([network(part.float()) for part in examples.hidden.split(4096)])
        labels, predicted = examples.labels.double(), logits.float().softmax(-1)[:, 1].double()
        plain = self.unweighted(predicted)
        bins = (plain * _BINS).long().clamp(max=_BINS - 1)
        table = []
        for index in range(_BINS):
            rows = bins == index
            if rows.any():
                columns = {"predicted": predicted[rows], "unweighted": plain[rows], "accepted": labels[rows]}
                means = {name: float(values.mean()) for name, values in columns.items()}
                table.append({"tokens": int(rows.sum())} | means)
        entropy = -(labels * plain.log() + (1 - labels) * (1 - plain).log()).mean()
        return AcceptanceQuality(
            float(self.loss(logits, examples.labels)),
            float(entropy),
            auc(predicted, labels),
            auc(labels, labels),
            float(labels.mean()),
            float((plain - labels).abs().mean()),
            table,
        )

    def save(self, network: AcceptanceHead, path: Path, fingerprint: str = "") -> None:
        """safetensors, in bfloat16."""
        network.save(path, fingerprint)

    def load(self, path: Path, fingerprint: str = "") -> AcceptanceHead:
        """The hyper-parameters of the network are those of the file."""
        return AcceptanceHead.load(path, fingerprint)


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
