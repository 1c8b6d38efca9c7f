import pytest

from fuzz import others
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_others_are_refused_by_name_or_answered_right():
    outcomes = fuzz("others", others.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["others"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["others"] * LONGER / 10
