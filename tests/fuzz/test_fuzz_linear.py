import pytest

from fuzz import linear
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_linear_are_refused_by_name_or_answered_right():
    outcomes = fuzz("linear", linear.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["linear"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["linear"] * LONGER / 10
