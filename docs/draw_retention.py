"""Draws docs/images/retention.png: python docs/draw_retention.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

import effattn
from effattn.reference.retention import powers

HEADS, TOKENS, CHUNK = 4, 24, 6
GRID, QUERY = (14, 14), (4, 5)

figure, axes = plt.subplots(1, 4, figsize=(15, 4), constrained_layout=True, width_ratios=(1.1, 1, 1, 1.5))
profiles, matrix, grid, scan = axes

distance = torch.arange(400)
for head, log_decay in enumerate(effattn.retnet_log_decay(HEADS)):
    profiles.plot(distance, (distance * log_decay).exp(), label=f"head {head}")
profiles.set(title="RetNet: weight of a token n back", xlabel="n", ylim=(0, 1.02), xlim=(0, 400))
profiles.legend(frameon=False)

position = torch.arange(TOKENS)
back = position[:, None] - position
weights = powers(effattn.retnet_log_decay(1), back.abs())[0].where(back >= 0, torch.nan)
matrix.imshow(weights, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
for begin in range(0, TOKENS, CHUNK):
    matrix.add_patch(Rectangle((begin - 0.5, begin - 0.5), CHUNK, CHUNK, fill=False, edgecolor="C1", linewidth=1.5))
matrix.set(title="G of head 0: chunks on the\ndiagonal, the rest by the state", xticks=[], yticks=[])
matrix.set(xlabel="key", ylabel="query")

steps = effattn.reference.manhattan_distance(GRID)[QUERY[0] * GRID[1] + QUERY[1]].view(GRID)
image = grid.imshow((steps * effattn.rmt_log_decay(HEADS)[1]).exp(), cmap="Blues", vmin=0, vmax=1)
grid.plot(QUERY[1], QUERY[0], "kx", markersize=7)
grid.set(title=f"RMT: head 1 of {HEADS} for one query (x)\non the {GRID[0]} x {GRID[1]} grid", xticks=[], yticks=[])
figure.colorbar(image, ax=grid, shrink=0.7)


def arrow(begin, end, **style):
    scan.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, **{"color": "black", **style}))


for chunk in range(3):
    left = 1.1 + 2.6 * chunk
    for low, text, colour in (
        (3, "output", "C0"),
        (1.5, r"$(QK^\top \odot G)V$" + "\ninside", "C1"),
        (0, "q, k, v", "0.6"),
    ):
        scan.add_patch(Rectangle((left, low), 1.6, 0.9, facecolor=colour, alpha=0.25, edgecolor=colour))
        scan.text(left + 0.8, low + 0.45, text, ha="center", va="center", fontsize=8)
    arrow((left + 0.8, 0.9), (left + 0.8, 1.5))
    arrow((left + 0.8, 2.4), (left + 0.8, 3))
    arrow((left - 1, 1.95), (left, 1.95), color="C3")
    scan.text(left - 0.5, 2.1, f"$S_{chunk}$", ha="center", color="C3")
arrow((1.1 + 2.6 * 2 + 1.6, 1.95), (1.1 + 2.6 * 3, 1.95), color="C3")
scan.text(1.1 + 2.6 * 3 - 0.5, 2.1, "$S_3$", ha="center", color="C3")
scan.set(xlim=(0, 9), ylim=(-0.2, 4.4), title="The chunk scan: one state of Dk x Dv goes on")
scan.axis("off")

figure.savefig(Path(__file__).parent / "images" / "retention.png", dpi=100)
