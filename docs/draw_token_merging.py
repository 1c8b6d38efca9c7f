"""Draws docs/images/token_merging.png: python docs/draw_token_merging.py

Needs scikit-learn and pillow for the photograph. The ViT-S/16 has random weights, so its keys group patches by colour
and texture, as the patch embedding lets them through, and not by what a trained model would see.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from effattn.bench import photographs, vit

from effattn.integrations.timm import merge_tokens
from effattn.visualize import merged_tokens

R, LAYERS = 16, (4, 8, 12)

images = photographs.images(2, (224, 224))
model = vit.VisionTransformer(vit.SMALL).eval()
grid = (vit.SMALL.image // vit.SMALL.patch,) * 2

figure, axes = plt.subplots(2, 1 + len(LAYERS), figsize=(9.6, 5.1), constrained_layout=True)
pixels = ((images + 1) / 2).clamp(0, 1)
for row, image in zip(axes, pixels):
    row[0].imshow(image.permute(1, 2, 0))
axes[0, 0].set_title(f"{grid[0] * grid[1]} patches", fontsize=10)
for column, layers in enumerate(LAYERS, 1):
    merging = merge_tokens(model, [R] * layers + [0] * (vit.SMALL.depth - layers), trace_source=True)
    with torch.no_grad():
        model(images)
    source = merging.source_map()
    for example, axis in enumerate(axes[:, column]):
        axis.imshow(merged_tokens(pixels[example], source, grid, num_prefix_tokens=1, example=example))
    tokens = merging.num_tokens(source.shape[1])[-1] - 1
    axes[0, column].set_title(f"after {layers} layers: {tokens} tokens", fontsize=10)
    print(layers, [len(each[1:].unique()) for each in source])
for axis in axes.flat:
    axis.axis("off")
figure.suptitle(f"ViT-S/16 with random weights, r = {R}: patches that merged, in their mean colour", fontsize=11)

figure.savefig(
    Path(__file__).parent / "images" / "token_merging.png", dpi=100, pil_kwargs={"optimize": True, "compress_level": 9}
)
