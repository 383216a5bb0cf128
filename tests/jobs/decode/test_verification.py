"""What `hasten decode` says about its verifier."""

import pytest

from hasten.accel.decoding.drafters.heads.lud import LudDrafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.verifiers.lexical_unit import LexicalUnit
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.decoding.verifiers.typical import Typical
from hasten.jobs.decode.verification import loss_notice


@pytest.mark.parametrize(
    ("verifier", "temperature", "says"),
    [(SampleAndMatch(), 1.0, False), (Typical(), 0.0, False), (Typical(), 1.0, True), (LexicalUnit(), 0.0, True)],
)
def test_an_output_that_is_not_the_targets_own_is_said_to_be_so(verifier, temperature, says):
    notice = loss_notice(verifier, LudDrafter(), Sampling(temperature=temperature))
    assert (notice is not None and "not the target's own" in notice) == says


def test_without_a_drafter_every_output_is_the_targets_own():
    assert loss_notice(LexicalUnit(), None, Sampling()) is None
