"""Whether models of a type run block by block: a tiny random one is saved, read, and held against transformers."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.reduced import reduced_config
from hasten.accel.models.skeleton import model_class

TOKENS = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))
# Of logits of order 1; the same modules run, and at most the experts of a mixture are added in another order.
_TOLERANCE = 1e-3
# Of a tiny model; configs of which that cannot be made are not tried.
_MOST_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Trial:
    """Outcome for a model type. reason: why it is not supported, "" if it is.

    linears: number of linear layers in the tiny model's blocks that are compressed. skipped: path in the block of those
    that are not, and the reason.
    """

    model_type: str
    reason: str
    linears: int = 0
    skipped: tuple[tuple[str, str], ...] = ()


def random_model(model_type: str, **changes: Any) -> Any:
    """A tiny random float32 model of a type; equal configs give equal weights."""
    config = reduced_config(model_type, **changes)
    kind = model_class(config, Path(model_type))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"its reduced config still has {parameters:.2g} parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are initialised as constants, and with a deviation of 0.02 blocks have hardly any effect.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


def logits_of(model: Any) -> torch.Tensor:
    """Logits of TOKENS, as transformers computes them."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return logits


def logits_by_blocks(architecture: Architecture) -> torch.Tensor:
    """Logits of TOKENS, block by block."""
    hidden = architecture.embed(TOKENS)
    for index in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(index), index, hidden)
    return architecture.head(hidden)


def try_type(model_type: str) -> Trial:
    """Try a model type."""
    try:
        model = random_model(model_type)
        expected = logits_of(model)
    # Whatever a class raises that is made from a config which was not made for it.
    except Exception as error:
        return Trial(model_type, f"no tiny model of it was made: {_one_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            architecture = Architecture(Checkpoint(folder))
            difference = float((logits_by_blocks(architecture) - expected).abs().max())
        except UserError as error:
            return Trial(
                model_type, _one_line(error).split(" is not supported: ")[-1].replace(folder, "the checkpoint")
            )
        except Exception as error:
            return Trial(model_type, f"it fails: {_one_line(error)}".replace(folder, "the checkpoint"))
        if not difference < _TOLERANCE:
            return Trial(model_type, f"its logits differ from those of transformers by {difference:.1g}")
        blocks = range(architecture.num_blocks)
        skipped = dict(pair for block in blocks for pair in architecture.skipped(block).values())
        return Trial(model_type, "", sum(len(architecture.linears(block)) for block in blocks), tuple(skipped.items()))


def model_types() -> list[str]:
    """All types of transformers with a causal language model, and those that read images and write text."""
    from transformers.models.auto import modeling_auto as auto

    return sorted(
        {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES},
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:197]}..."
