"""Acceptance head: predicts from the draft model's hidden state whether the target accepts a drafted token.

Source: Huang et al. 2024, arXiv:2405.19715 (SpecDec++).
Departs from it: each residual block has its own weights; in the released code all blocks share theirs, because it
repeats one block.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole

FILE = "acceptance_head.safetensors"
_NOTE = "acceptance_head"


class ResBlock(nn.Module):
    """x + SiLU(Wx + b)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Residual blocks and a linear layer with two outputs: rejected and accepted."""

    def __init__(self, hidden_size: int, blocks: int = 3) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.blocks = nn.Sequential(*(ResBlock(hidden_size) for _ in range(blocks)))
        self.out = nn.Linear(hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (…, 2) of rejection and acceptance; hidden: (…, D), the last hidden state of the drafted token."""
        logits: Tensor = self.out(self.blocks(hidden))
        return logits

    @torch.no_grad()
    def accepts(self, hidden: Tensor) -> Tensor:
        """Probability (…) float32 that the token is accepted, given that all before it are.

        It is biased towards rejection by the weight that rejections have in training.
        """
        # With two classes, the softmax is the sigmoid of the difference of the logits.
        logits = self(hidden.float())
        return (logits[..., 1] - logits[..., 0]).sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the file, in bfloat16: a probability is not needed to more than three digits."""
        return {name: value.detach().cpu().bfloat16().contiguous() for name, value in self.state_dict().items()}

    def note(self, draft: str = "") -> dict[str, str]:
        """Metadata for the file. draft: fingerprint of the draft model that the head was trained for."""
        facts = {"hidden_size": self.hidden_size, "blocks": len(self.blocks), "draft": draft}
        return {_NOTE: json.dumps(facts, sort_keys=True)}

    def save(self, path: Path, draft: str = "") -> None:
        """Write the file atomically."""
        write_whole(path, lambda temporary: save_file(self.tensors(), temporary, self.note(draft)))

    @classmethod
    def load(cls, path: Path, draft: str = "") -> "AcceptanceHead":
        """The head of a file, in float32; UserError if it is no head, or was trained for another draft model.

        draft: fingerprint of the draft model that it will be used with; empty if unknown.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_NOTE])
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            head = cls(int(facts["hidden_size"]), int(facts["blocks"]))
            head.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is not an acceptance head: train one with hasten train_drafter") from error
        noted = facts.get("draft", "")
        if draft and noted and draft != noted:
            raise UserError(
                f"the acceptance head {path} was trained for another draft model: train one with hasten train_drafter"
            )
        return head.eval()
