"""Draws docs/images/shift_add.png: python docs/draw_shift_add.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import effattn

ROWS, COLUMNS, TOKENS = 256, 256, 24

generator = torch.Generator().manual_seed(3)
figure, axes = plt.subplots(1, 4, figsize=(15, 4), constrained_layout=True)
steps, codes, storage, attention = axes

weights = torch.linspace(-1.1, 1.1, 2001)
packed = effattn.quantize_power_of_two(weights[None].clone(), bits=4)
steps.plot(weights, weights, color="0.75", linewidth=1, label="w")
steps.plot(weights, packed.dequantize()[0], color="C0", label="4 bits: ±1, ±1/2, .. ±1/64")
steps.set(title="Weights become signed powers of two", xlabel="weight / scale", ylabel="what the layer uses")
steps.legend(frameon=False, fontsize=8)

weight = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
layer = effattn.quantize_power_of_two(weight, bits=4, scale="channel")
used = layer.dequantize()
largest = used.abs().amax(1, keepdim=True)
exponents = (used.abs() / largest).log2().round().flatten()
counts = torch.stack([(exponents == p).sum() for p in range(-6, 1)]) / exponents.numel()
codes.bar(range(-6, 1), counts, color="C0")
codes.set(
    title=f"Exponents of a layer, {ROWS} x {COLUMNS},\na scale per row",
    xlabel="p of w = s 2^p",
    ylabel="share of the weights",
)

sizes = {
    "float32": weight.nbytes,
    "bfloat16": weight.nbytes // 2,
    "5 bits": effattn.quantize_power_of_two(weight, bits=5, scale="channel").nbytes,
    "4 bits": layer.nbytes,
}
bars = storage.barh(list(sizes), [size / 1024 for size in sizes.values()], color=("0.7", "0.7", "C0", "C0"))
storage.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
storage.invert_yaxis()
storage.set(title="KiB that the layer reads", xlim=(0, 300))

query, key = torch.randn(2, 1, 1, TOKENS, 32, generator=generator)
bits = [effattn.reference.shift_add.binarize(x, "per_head") for x in (query, key)]
products = (bits[0] @ bits[1].mT)[0, 0]
image = attention.imshow(products, cmap="Blues", vmin=0, interpolation="nearest")
attention.set(
    title="b(q^) b(k^)^T: sums of bits, times one number.\nIt is never formed: (b(k^)^T V) comes first",
    xlabel="key",
    ylabel="query",
)
attention.set(xticks=[], yticks=[])
figure.colorbar(image, ax=attention, shrink=0.7)

figure.savefig(Path(__file__).parent / "images" / "shift_add.png", dpi=80)
