import pytest

from fuzz import modules
from fuzz.runner import LONGER, SHARES, fuzz


@pytest.mark.slow
def test_hostile_arguments_of_modules_are_refused_by_name_or_answered_right():
    outcomes = fuzz("modules", modules.SUBJECTS)
    assert outcomes["refused"] + outcomes["answered"] >= SHARES["modules"] * LONGER
    assert min(outcomes["refused"], outcomes["answered"]) > SHARES["modules"] * LONGER / 10
