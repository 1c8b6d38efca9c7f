"""Draws docs/images/gaussian_mixture.png: python docs/draw_gaussian_mixture.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import effattn

HEIGHT, WIDTH, QUERY = 14, 14, (4, 5)
HEADS = {  # title: (alpha, sigma) of each Gaussian
    "one wide Gaussian": [(1.0, 6.0), (0.0, 1.0)],
    "one narrow Gaussian": [(1.0, 1.5), (0.0, 1.0)],
    "a ring: wide minus narrow": [(1.5, 4.0), (-1.5, 2.0)],
    "near up, middle down": [(2.2, 2.5), (-1.2, 6.0)],
}

parameters = torch.tensor(list(HEADS.values()))  # (H, K, 2)
alpha, sigma = parameters.unbind(-1)
mask = effattn.GaussianMixtureMask(alpha.T, sigma.T, (HEIGHT, WIDTH), num_prefix_tokens=1)
dense = mask.dense()
query = 1 + QUERY[0] * WIDTH + QUERY[1]

figure, axes = plt.subplots(2, len(HEADS), figsize=(12, 5.9), constrained_layout=True)
colours = dict(cmap="RdBu_r", vmin=-1.2, vmax=1.2, interpolation="nearest")
for head, title in enumerate(HEADS):
    on_grid, matrix = axes[:, head]
    on_grid.imshow(dense[head, query, 1:].view(HEIGHT, WIDTH), **colours)
    on_grid.plot(QUERY[1], QUERY[0], "kx", markersize=7)
    on_grid.set_title(title, fontsize=10)
    image = matrix.imshow(dense[head], **colours)
    for axis in (on_grid, matrix):
        axis.set_xticks([])
        axis.set_yticks([])
axes[0, 0].set_ylabel(f"M for one query (x)\non the {HEIGHT} x {WIDTH} grid")
axes[1, 0].set_ylabel(f"M for all {dense.shape[1]} x {dense.shape[1]} pairs\n(first row and column: class token)")
figure.colorbar(image, ax=axes, shrink=0.8, label="factor of the scaled score")
figure.savefig(Path(__file__).parent / "images" / "gaussian_mixture.png", dpi=110)
