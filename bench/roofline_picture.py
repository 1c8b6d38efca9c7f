"""The picture of docs/roofline.md: FLOP/s against arithmetic intensity, a panel per dtype."""

from __future__ import annotations

from .plot import GRID, INK, MUTED

COLOURS = {
    "attention": "#1f2430",
    "gaussian_mixture": "#0f766e",
    "cross_shaped_window": "#b45309",
    "retention": "#2563eb",
    "toeplitz": "#9333ea",
    "token_merging": "#65a30d",
    "shift_add": "#e11d48",
}
TITLES = {"float32": "float32", "bfloat16": "bfloat16"}


def draw(points: list, path: str) -> None:
    """Write a PNG; of more than one machine the one with most rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machines = [point.machine for point in points]
    machine = max(dict.fromkeys(machines), key=machines.count)
    # Bits are not multiply-adds: such a row has no place under a roof of FLOPs.
    points = [point for point in points if point.machine == machine and point.flops_limit]
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, panels = plt.subplots(1, len(TITLES), figsize=(12.6, 5.6), sharey=True, layout="constrained")
    for panel, (dtype, title) in zip(panels, TITLES.items()):
        _panel(panel, title, [point for point in points if point.row["dtype"] == dtype])
    panels[0].set_ylabel("GFLOP/s")
    dots = {"linestyle": "", "marker": "o", "markersize": 6}
    handles = [plt.Line2D([], [], color=colour, **dots) for colour in COLOURS.values()]
    labels = [name.replace("_", " ") for name in COLOURS]
    handles += [plt.Line2D([], [], color=MUTED, markerfacecolor="none", **dots)]
    legend = figure.legend(
        handles, [*labels, "hollow: forward + backward"], loc="outside upper center", ncols=8, frameon=False, fontsize=9
    )
    legend.set_title(f"Roofline, {machine}", prop={"size": 13, "weight": "bold"})
    figure.savefig(path, dpi=150, facecolor="white", format="png")
    plt.close(figure)


def _panel(panel, title: str, points: list) -> None:
    for point in points:
        training = point.row["direction"] != "forward"
        colour = COLOURS[point.row["family"]]
        face = "none" if training else colour
        rate = point.row["flops"] / point.ms / 1e6
        panel.plot(point.intensity, rate, "o", markersize=6, color=colour, markerfacecolor=face, alpha=0.85, zorder=3)
    # Ceilings differ by a few per cent from run to run: the roof is of the highest.
    peak = max(point.row["flops"] / point.flops_limit for point in points) / 1e9
    copy = max(point.row["bytes"] / point.bytes_limit for point in points) / 1e9
    low, high = 0.3, 4000.0
    for share, style in ((1.0, "-"), (0.5, ":")):
        x = [low, peak / copy, high]
        y = [share * copy * low, share * peak, share * peak]
        panel.plot(x, y, style, color=INK, linewidth=1.4 if share == 1 else 1.0, zorder=2)
    panel.text(high, 1.06 * peak, f"multiply-adds, {peak:.0f} GFLOP/s", ha="right", va="bottom", fontsize=9)
    panel.text(high, 0.53 * peak, "half", ha="right", va="bottom", fontsize=9, color=MUTED)
    panel.annotate(
        f"copy, {copy:.0f} GB/s", (3.0, 3 * copy), (-8, 2), textcoords="offset points", ha="right", fontsize=9
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    panel.set_ylim(0.1, 1000)
    panel.set_title(title, fontsize=11, fontweight="bold", loc="left", color=INK)
    panel.set_xlabel("FLOP per byte")
    panel.grid(color=GRID, linewidth=0.8, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=INK)
