import pytest

from fuzz import bits
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_bits_are_refused_by_name_or_answered_right():
    outcomes = fuzz("bits", bits.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["bits"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["bits"] * LONGER / 10
