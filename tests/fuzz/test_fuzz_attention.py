import pytest

from fuzz import attention
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_attention_are_refused_by_name_or_answered_right():
    outcomes = fuzz("attention", attention.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["attention"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["attention"] * LONGER / 10
