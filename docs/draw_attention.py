"""Draws docs/images/attention.png: python docs/draw_attention.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

TOKENS, QUERY_BLOCK, KEY_BLOCK = 768, 48, 256  # kQueryBlock and kKeyBlock of csrc/cpu/policy.h
HEADS, KEY_HEADS = 8, 2

figure, axes = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
for axis, causal in zip(axes, (False, True)):
    computed = 0
    for row in range(0, TOKENS, QUERY_BLOCK):
        last_key = row + QUERY_BLOCK if causal else TOKENS  # key_limit of the block's last row
        for key in range(0, last_key, KEY_BLOCK):
            width = min(KEY_BLOCK, last_key - key)
            computed += width * QUERY_BLOCK
            axis.add_patch(Rectangle((key, row), width, QUERY_BLOCK, facecolor="#9ecae1", edgecolor="white"))
    axis.set(xlim=(0, TOKENS), ylim=(TOKENS, 0), aspect="equal", xlabel="key", ylabel="query")
    axis.set(xticks=range(0, TOKENS + 1, KEY_BLOCK), yticks=range(0, TOKENS + 1, 4 * QUERY_BLOCK))
    name = "is_causal=True" if causal else "no mask"
    axis.set_title(f"{name}: {100 * computed / TOKENS**2:.0f} % of the scores,\ntiles of {QUERY_BLOCK} x {KEY_BLOCK}")
    if causal:
        axis.plot((0, TOKENS), (0, TOKENS), color="C3", linewidth=1)

shared = torch.arange(HEADS) // (HEADS // KEY_HEADS)
groups = axes[2]
for head, key_head in enumerate(shared.tolist()):
    colour = f"C{key_head}"
    groups.add_patch(Rectangle((0, head + 0.1), 1, 0.8, facecolor=colour, alpha=0.4))
    groups.text(0.5, head + 0.5, f"query head {head}", ha="center", va="center", fontsize=8)
    middle = (key_head + 0.5) * HEADS / KEY_HEADS
    groups.plot((1, 2), (head + 0.5, middle), color=colour, linewidth=1)
for key_head in range(KEY_HEADS):
    middle = (key_head + 0.5) * HEADS / KEY_HEADS
    groups.add_patch(Rectangle((2, middle - 0.5), 1.3, 1, facecolor=f"C{key_head}", alpha=0.4))
    groups.text(2.65, middle, f"key and value\nhead {key_head}", ha="center", va="center", fontsize=8)
groups.set(
    xlim=(-0.1, 3.4), ylim=(HEADS, 0), title="enable_gqa=True: keys are packed once\nfor the heads that share them"
)
groups.axis("off")

figure.savefig(Path(__file__).parent / "images" / "attention.png", dpi=80)
