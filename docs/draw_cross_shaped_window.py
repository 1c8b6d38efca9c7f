"""Draws docs/images/cross_shaped_window.png: python docs/draw_cross_shaped_window.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

import effattn

GRID, QUERY = (14, 14), (5, 8)
TOKENS, INDEX = GRID[0] * GRID[1], QUERY[0] * GRID[1] + QUERY[1]


def seen(function, *args, **kwargs) -> torch.Tensor:
    """(H, h, w): the weights of one query, read off the operator: values that are the identity give them."""
    value = torch.eye(TOKENS).expand(1, kwargs.pop("heads"), -1, -1)
    nothing = torch.zeros_like(value)
    weights = function(nothing, nothing, value, GRID, *args, backend="reference", **kwargs)
    return weights[0, :, INDEX].view(-1, *GRID)


vertical, horizontal = seen(effattn.cross_shaped_window_attention, 2, heads=2)
swin = seen(effattn.window_attention, (7, 7), heads=1)[0]
shifted = seen(effattn.window_attention, (7, 7), heads=1, shift=(3, 3))[0]
hat = seen(effattn.window_attention, (7, 7), heads=1, overlap=(2, 2))[0]
cross = torch.stack((vertical > 0, horizontal > 0)).float()

panels = {
    "CSWin, stripes of 2\nheads 0 .. H/2 - 1 (blue), H/2 .. H - 1 (orange)": cross[0] + 2 * cross[1],
    "Swin, windows of 7 x 7": (swin > 0).float(),
    "Swin, shifted by (3, 3)": (shifted > 1e-6).float(),  # -100 leaves the others exp(-100)
    "HAT, overlap of (2, 2)": (hat > 0).float(),
}
borders = {
    1: ([6.5], [6.5], "0.3"),
    2: ([3.5, 10.5], [3.5, 10.5], "0.3"),
    3: ([6.5], [6.5], "0.3"),
}

figure, axes = plt.subplots(1, 4, figsize=(13.5, 3.9), constrained_layout=True)
colours = ListedColormap(["white", "#9ecae1", "#fdae6b", "#bcbddc"])
for column, (axis, (title, keys)) in enumerate(zip(axes, panels.items())):
    axis.imshow(keys, cmap=colours, vmin=0, vmax=3, interpolation="nearest")
    axis.plot(QUERY[1], QUERY[0], "kx", markersize=8, markeredgewidth=2)
    for line in range(1, GRID[0]):
        axis.axhline(line - 0.5, color="0.88", linewidth=0.6)
        axis.axvline(line - 0.5, color="0.88", linewidth=0.6)
    if column in borders:
        rows, columns, colour = borders[column]
        for row in rows:
            axis.axhline(row, color=colour, linewidth=1.4)
        for each in columns:
            axis.axvline(each, color=colour, linewidth=1.4)
    axis.set(title=title, xticks=[], yticks=[])
    axis.title.set_fontsize(10)
figure.suptitle(f"The keys of one query (x) on a {GRID[0]} x {GRID[1]} grid", fontsize=11)

figure.savefig(Path(__file__).parent / "images" / "cross_shaped_window.png", dpi=90)
