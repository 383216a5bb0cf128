"""Which tokens end a sentence, by the text that they stand for."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

_ENDS = tuple(".!?…。！？")
_CLOSING = " \t\"'”’»)]}"
_KNOWN: WeakKeyDictionary[PreTrainedModel, Tensor] = WeakKeyDictionary()


def sentence_ends(model: PreTrainedModel) -> Tensor:
    """Ids (N,) of the tokens that end a sentence or a line; none where no tokenizer lies beside the model's files.

    A token ends a sentence if its text, without quotes and brackets that close behind it, ends with a full stop, a
    question mark or the like.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _ends_of(str(model.name_or_path))
    return _KNOWN[model]


def _ends_of(folder: str) -> Tensor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return torch.empty(0, dtype=torch.long)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = [token for token, text in enumerate(texts) if "\n" in text or text.rstrip(_CLOSING).endswith(_ENDS)]
    return torch.tensor(ends, dtype=torch.long)
