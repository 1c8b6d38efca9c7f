"""Draws docs/images/toeplitz.png: python docs/draw_toeplitz.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from effattn import reference
from effattn.reference.toeplitz import relative_weights, toeplitz_matrix

TOKENS, GRID, QUERY = 24, (14, 14), (4, 5)
FEATURES, HEAD_DIM, LENGTH = 32, 64, 1024  # of the errors and operations
RANGES = range(0, 33, 2)

generator = torch.Generator().manual_seed(2)
figure, axes = plt.subplots(1, 4, figsize=(15.5, 4), constrained_layout=True, width_ratios=(1, 1, 1.3, 1.3))
matrix, grid, errors, operations = axes

distance = torch.arange(1 - TOKENS, TOKENS)
bias = 1.5 * torch.cos(0.9 * distance) - 0.12 * distance.abs() - 0.06 * distance
matrix.imshow(toeplitz_matrix(relative_weights(bias[None]))[0], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
matrix.set(title="C: one weight for each\nrelative position, c = exp(b - max b)", xlabel="key", ylabel="query")
matrix.set(xticks=[], yticks=[])

down, right = (torch.arange(1 - extent, extent)[:, None] for extent in GRID)
table = -0.25 * (down.square() + right.mT.square()).sqrt() + 0.8 * torch.cos(1.2 * right.mT)
weights = toeplitz_matrix(relative_weights(table.flatten()[None]).view(1, *table.shape), GRID)[0]
row = weights[QUERY[0] * GRID[1] + QUERY[1]].view(GRID)
image = grid.imshow(row, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
grid.plot(QUERY[1], QUERY[0], "kx", markersize=7)
grid.set(title=f"The weights of one query (x)\non the {GRID[0]} x {GRID[1]} grid", xticks=[], yticks=[])
figure.colorbar(image, ax=grid, shrink=0.7)


def by_transform(query, key, value, bias):
    """(1, 1, N, M) features, a transform for each m."""
    weights, length = relative_weights(bias)[0], query.shape[2]
    kernel = torch.nn.functional.pad(weights.flip(0), (0, 1)).roll(1 - length)
    columns = torch.cat((value, torch.ones_like(value[..., :1])), -1)[0, 0]
    outer = key[0, 0, :, :, None] * columns[:, None]
    product = torch.fft.rfft(outer, 2 * length, dim=0) * torch.fft.rfft(kernel)[:, None, None]
    sums = (torch.fft.irfft(product, 2 * length, dim=0)[:length] * query[0, 0, :, :, None]).sum(1)
    return (sums[:, :-1] / sums[:, -1:])[None, None]


features = torch.rand(2, 1, 1, LENGTH, 8, generator=generator)
value = torch.randn(1, 1, LENGTH, 8, generator=generator)
inputs = (*features, value)
away = torch.arange(1 - LENGTH, LENGTH)
for causal, style in ((False, "-"), (True, "--")):
    measured = {"FFT, float32": [], "FFT, float64": [], "direct, float32": []}
    for nats in RANGES:
        ramp = (
            (away.abs() if causal else -away) * nats / (LENGTH if causal else 2 * LENGTH)
        )  # causal: the past weighs most
        ramp = ramp.masked_fill(away > 0, -torch.inf)[None] if causal else ramp[None]
        exact = reference.toeplitz_linear_attention(*(t.double() for t in inputs), ramp.double())
        results = {
            "FFT, float32": by_transform(*inputs, ramp),
            "FFT, float64": by_transform(*(t.double() for t in inputs), ramp.double()),
            "direct, float32": reference.toeplitz_linear_attention(*inputs, ramp),
        }
        for name, result in results.items():
            error = (result - exact).abs().nan_to_num(torch.inf).max() / exact.abs().max()
            measured[name].append(max(error.item(), 1e-17))
    print(causal, {name: [f"{e:.0e}" for e in values] for name, values in measured.items()})
    for colour, (name, values) in zip(("C3", "C1", "C0"), measured.items()):
        label = f"{name}{', causal' if causal else ''}"
        errors.plot(RANGES, values, style, color=colour, label=label)
errors.set(title="Largest error over largest output,\nthe bias being a ramp", yscale="log", ylim=(1e-16, 1e8))
errors.set(xlabel="range of the bias in nats", xlim=(0, 32))
errors.legend(frameon=False, fontsize=7, loc="upper center", ncols=2)

tokens = 2.0 ** torch.arange(7, 18)
pair, reach = 2 * (FEATURES + HEAD_DIM), 128
counts = {
    "direct": pair * tokens**2,
    "fft": 10 * tokens * (2 * tokens).log2() * FEATURES * (HEAD_DIM + 1),
    f"structured, {reach} near keys a side": tokens * (2 * reach * pair + 8 * FEATURES * (HEAD_DIM + 1)),
}
for colour, (name, count) in zip(("C0", "C3", "C2"), counts.items()):
    operations.loglog(tokens, count, color=colour, label=name)
operations.set(title=f"FLOPs of a head, M = {FEATURES}, D = {HEAD_DIM}", xlabel="tokens", xlim=(128, 2**17))
operations.legend(frameon=False, fontsize=8)

figure.savefig(Path(__file__).parent / "images" / "toeplitz.png", dpi=100)
