"""docs/roofline.md is what the recorded runs say, and every row below half of its ceiling has a reason that is still one."""

from __future__ import annotations

import pytest
from effattn.bench import roofline
from effattn.bench.roofline_reasons import ABOVE, BELOW


@pytest.fixture(scope="module")
def points():
    return roofline.points()


def low(points):
    return [point for point in points if point.share < roofline.LOW]


def a_point(operator, case, direction="forward", dtype="float32"):
    """The recorded row of that name."""
    return next(
        p
        for p in roofline.points()
        if (p.row["operator"], p.row["direction"], p.row["dtype"]) == (operator, direction, dtype)
        and case in p.row["case"]
    )


def test_committed_page_is_what_the_runs_say():
    assert roofline.main(["--check"]) == 0, "docs/roofline.md is stale; run: python -m effattn.bench.roofline"


def test_check_refuses_a_stale_page_and_writing_mends_it(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "roofline.md"
    stale.write_text(roofline.PAGE.read_text().replace("FLOPs", "flops"))
    monkeypatch.setattr(roofline, "PAGE", stale)
    assert roofline.main(["--check"]) == 1
    assert "python -m effattn.bench.roofline" in capsys.readouterr().err
    assert roofline.main([]) == 0
    assert roofline.main(["--check"]) == 0
    assert (tmp_path / roofline.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_every_row_below_half_has_a_reason(points):
    without = [
        point.row["operator"] + " " + point.row["case"] for point in low(points) if not roofline.reason(point, BELOW)
    ]
    assert not without


def test_every_row_above_its_ceiling_has_a_reason(points):
    assert not [p.row["operator"] for p in points if p.share > 1.005 and not roofline.reason(p, ABOVE)]


@pytest.mark.parametrize("reason", BELOW, ids=lambda reason: reason.what)
def test_every_reason_has_a_row_below_half(points, reason):
    assert any(roofline.reason(point, BELOW) is reason for point in low(points)), "a stale sentence: take it out"


@pytest.mark.parametrize("reason", ABOVE, ids=lambda reason: reason.what)
def test_every_reason_above_has_a_row(points, reason):
    assert any(roofline.reason(point, ABOVE) is reason for point in points if point.share > 1)


def test_a_score_has_one_exponential_forward_and_two_in_training():
    for operator, case, per_pass in (
        ("plain", "1x12x1024x64", 12 * 1024**2),
        ("causal", "1x12x1024x64", 12 * 1024 * 1025 / 2),
        ("shifted_window", "Swin-T/224 stage 4", 8 * 24 * 49**2),
        ("cross_shaped_window", "CSWin-T/224 stage 4", 8 * 16 * 49**2),
        ("manhattan decomposed, LCE", "stage 3", 8 * 8 * 196 * 28),
        ("soft_merge", "P=256", 8 * 1024 * 256),
    ):
        assert roofline.exponentials(a_point(operator, case).row) == pytest.approx(per_pass)
        if operator != "causal":
            training = a_point(operator, case, roofline.TRAINING)
            assert roofline.exponentials(training.row) == pytest.approx(2 * per_pass)
    for operator, case in (("retention", "1x8x1024x64"), ("kernelized_rpe", "1x8x512x64"), ("linear", "784x128")):
        assert roofline.exponentials(a_point(operator, case).row) == 0


def test_keys_of_decomposed_attention_are_those_of_one_line():
    assert a_point("manhattan decomposed", "stage 1").keys == 56
    assert a_point("manhattan decomposed", "stage 1", roofline.TRAINING).keys == 56


def test_shares_are_least_time_over_time(points):
    for point in points:
        result = point.row["results"]["effattn"]
        if point.row["operator"] not in roofline.COUNTS_BITS:
            assert point.share == pytest.approx(result["ceiling_share"])
        assert point.share_with_exponentials >= point.share
        assert point.bound == ("FLOPs" if point.flops_limit >= point.bytes_limit else "bytes")
