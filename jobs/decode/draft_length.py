"""The draft length policy that the options of `hasten decode` choose."""

from hasten.accel.decoding.lengths.base import DraftLength
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.jobs.cli.methods import build
from hasten.jobs.decode.options import DecodeConfig


def chosen_draft_length(config: DecodeConfig) -> DraftLength:
    """A fixed draft length if draft_tokens is given, else config.draft_length."""
    if config.draft_tokens is not None:
        return Fixed(config.draft_tokens)
    length: DraftLength = build(config.draft_length)
    return length
