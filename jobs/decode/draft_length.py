"""The draft length that the options of `hasten decode` ask for."""

from hasten.accel.decoding.lengths.base import DraftLength
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.jobs.cli.methods import build
from hasten.jobs.decode.options import DecodeConfig


def chosen_draft_length(config: DecodeConfig) -> DraftLength:
    """config.draft_length, unless draft_tokens, which is short for a fixed one, is given."""
    if config.draft_tokens is not None:
        return Fixed(config.draft_tokens)
    length: DraftLength = build(config.draft_length)
    return length
