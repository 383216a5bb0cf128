"""A tokenizer's backend with one token a byte, so that tests know the ids of a text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def one_token_a_byte() -> Tokenizer:
    """A backend with ids 0 to 255, and no token that begins or ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
