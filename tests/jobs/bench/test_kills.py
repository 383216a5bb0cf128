import pytest

from hasten.accel.errors import UserError
from hasten.jobs.bench import kills


def test_a_variant_adds_its_options_and_a_scheme_says_its_own_bits():
    config = kills.Config(bits=3)
    assert kills._options(config, "")["bits"] == 3
    given = kills._options(config, "scheme=nvfp4 transforms=[awq,smoothquant]")
    assert (given["scheme"], given["transforms"]) == ("nvfp4", "[awq,smoothquant]")
    assert "bits" not in given
    assert kills._options(config, "symmetric=true")["bits"] == 3


def test_a_word_without_a_value_is_named():
    with pytest.raises(UserError, match="variants has 'awq'"):
        kills._options(kills.Config(), "scheme=fp8 awq")
