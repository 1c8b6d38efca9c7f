import pytest

from fuzz import merging
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_merging_are_refused_by_name_or_answered_right():
    outcomes = fuzz("merging", merging.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["merging"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["merging"] * LONGER / 10
