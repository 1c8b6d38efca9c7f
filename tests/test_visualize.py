"""Pictures of merged patches: colours, lines, layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import effattn
from effattn.visualize import merged_tokens

PATCH, GRID = 4, (2, 3)
HEIGHT, WIDTH = GRID[0] * PATCH, GRID[1] * PATCH
APART = torch.arange(6)
WHITE = torch.tensor([255, 255, 255], dtype=torch.uint8)


@pytest.fixture
def image():
    return torch.randint(0, 250, (HEIGHT, WIDTH, 3), dtype=torch.uint8)


def patch(picture, index):
    row, column = divmod(index, GRID[1])
    return picture[row * PATCH :][:PATCH, column * PATCH :][:, :PATCH]


def test_patches_that_merged_with_none_stay_as_they_are(image):
    assert torch.equal(merged_tokens(image, APART, GRID, border=None), image)


def test_a_merged_group_has_its_mean_colour(image):
    painted = merged_tokens(image, torch.tensor([4, 1, 2, 4, 3, 4]), GRID, border=None)
    mean = torch.stack([patch(image, i) for i in (0, 3, 5)]).double().mean((0, 1, 2)).round().to(torch.uint8)
    for index in (0, 3, 5):
        assert (patch(painted, index) == mean).all()
    for index in (1, 2, 4):
        assert torch.equal(patch(painted, index), patch(image, index))


def test_lines_run_between_tokens_and_not_within(image):
    source = torch.tensor([0, 0, 1, 0, 2, 1])
    painted = merged_tokens(image, source, GRID)
    line = (painted == WHITE).all(-1)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[:PATCH, 2 * PATCH - 1] = True  # 1 | 2
    expected[PATCH:, PATCH - 1] = True  # 3 | 4
    expected[PATCH:, 2 * PATCH - 1] = True  # 4 | 5
    expected[PATCH - 1, PATCH : 2 * PATCH] = True  # 1 above 4
    assert torch.equal(line, expected)


def test_one_token_has_one_colour_and_no_line(image):
    painted = merged_tokens(image, torch.zeros(6, dtype=torch.int64), GRID)
    assert (painted == painted[0, 0]).all()


def test_the_line_has_the_colour_that_is_asked_for(image):
    painted = merged_tokens(image, APART, GRID, border=(255, 0, 7))
    assert painted[0, PATCH - 1].tolist() == [255, 0, 7]


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("kind", ["uint8", "float32", "bfloat16", "numpy uint8", "numpy float64"])
def test_every_layout_and_type_gives_the_same_picture(image, channels_first, kind):
    image = image // 51 * 51  # fifths: near exact in every type
    source = torch.tensor([0, 0, 1, 2, 3, 2])
    expected = merged_tokens(image, source, GRID)
    given = image.permute(2, 0, 1) if channels_first else image
    if "float" in kind:
        given = given / 255
        given = given.double() if "64" in kind else given.to(getattr(torch, kind))
    if "numpy" in kind:
        given = given.numpy()
        given.setflags(write=False)
    painted = merged_tokens(given, source, GRID)
    assert (painted.dtype, painted.shape) == (torch.uint8, (HEIGHT, WIDTH, 3))
    assert (painted.int() - expected.int()).abs().max() <= (1 if "bfloat16" in kind else 0)


def test_a_plan_is_painted_as_its_source_map(image):
    plan = effattn.bipartite_soft_matching(torch.randn(2, 7, 4), 2, num_protected=1, backend="reference")
    source = plan.source_map()
    painted = merged_tokens(image, plan, GRID, num_prefix_tokens=1, example=1)
    assert torch.equal(painted, merged_tokens(image, source, GRID, num_prefix_tokens=1, example=1))
    assert torch.equal(painted, merged_tokens(image, source[1:, 1:], GRID))
    assert torch.equal(painted, merged_tokens(image, source[1].int(), GRID, num_prefix_tokens=1))


def test_the_numbers_of_the_tokens_do_not_matter(image):
    source = torch.tensor([4, 4, 0, 9, 9, 2])
    assert torch.equal(merged_tokens(image, source, GRID), merged_tokens(image, 10 * source + 3, GRID))


def test_an_image_that_the_grid_does_not_divide_is_shared_out():
    image = torch.arange(5.0).view(1, 5, 1).expand(3, 5, 7) / 5
    painted = merged_tokens(image, torch.tensor([0, 0, 1, 1]), (2, 2), border=None)
    assert painted.shape == (5, 7, 3)
    assert len(painted[:, 0, 0].unique()) == 2


def test_arguments_are_left_alone(image):
    before, source = image.clone(), torch.tensor([0, 0, 0, 1, 2, 2])
    merged_tokens(image, source, GRID)
    array = before.numpy().copy()
    merged_tokens(array, source, GRID)
    assert torch.equal(image, before)
    assert np.array_equal(array, before.numpy())


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"image": "picture.png"}, "image", TypeError),
        ({"image": torch.zeros(4, 4)}, "image", ValueError),
        ({"image": torch.zeros(1, HEIGHT, WIDTH)}, "image", ValueError),
        ({"image": torch.zeros(3, HEIGHT, WIDTH, dtype=torch.int64)}, "image", TypeError),
        ({"image": torch.full((3, HEIGHT, WIDTH), -0.5)}, "image", ValueError),
        ({"image": torch.full((3, HEIGHT, WIDTH), float("nan"))}, "image", ValueError),
        ({"plan": [0, 1, 2, 3, 4, 5]}, "plan", TypeError),
        ({"plan": torch.zeros(6)}, "plan", TypeError),
        ({"plan": torch.zeros(5, dtype=torch.int64)}, "plan", ValueError),
        ({"plan": torch.zeros(1, 1, 6, dtype=torch.int64)}, "plan", ValueError),
        ({"num_prefix_tokens": 1}, "num_prefix_tokens", ValueError),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens", ValueError),
        ({"example": 1}, "example", ValueError),
        ({"grid": (3, 3)}, "grid", ValueError),
        ({"grid": (0, 6)}, "grid", ValueError),
        ({"grid": 6}, "grid", TypeError),
        ({"grid": (1, 6), "image": torch.zeros(3, 4, 5)}, "grid", ValueError),
        ({"border": (0, 0, 256)}, "border", ValueError),
        ({"border": "red"}, "border", ValueError),
    ],
)
def test_wrong_arguments_are_named(image, change, name, error):
    with pytest.raises(error, match=name):
        merged_tokens(**({"image": image, "plan": APART, "grid": GRID} | change))
