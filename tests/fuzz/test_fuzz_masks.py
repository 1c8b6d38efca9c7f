import pytest

from fuzz import masks
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_masks_are_refused_by_name_or_answered_right():
    outcomes = fuzz("masks", masks.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["masks"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["masks"] * LONGER / 10
