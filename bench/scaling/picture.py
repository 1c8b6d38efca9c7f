"""The picture of docs/scaling.md: what was measured at the sizes held out against what was predicted."""

from __future__ import annotations

import statistics

from ..plot import GRID, INK, MUTED
from . import model
from .subjects import SUBJECTS
from .timing import key

COLOURS = ("#0f766e", "#b45309", "#1d4ed8", "#be185d", "#4d7c0f", "#6d28d9", "#475569")


def draw(found: dict, path: str) -> None:
    """Write a PNG: one panel for each direction, a mark for each held-out size, and the band of ``model.LIMIT``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    names = [name for name in SUBJECTS if name in found["fits"]]
    families = list(dict.fromkeys(SUBJECTS[name].family for name in names))
    colours = dict(zip(families, COLOURS))
    directions = list(dict.fromkeys(d for name in names for d in SUBJECTS[name].directions))
    figure, panels = plt.subplots(
        1, len(directions), figsize=(6.2 * len(directions), 5.6), squeeze=False, layout="constrained"
    )
    for panel, direction in zip(panels[0], directions):
        everything = []
        for name in names:
            if direction not in SUBJECTS[name].directions:
                continue
            predicted, measured = zip(*_points(found, name, direction))
            everything += [*predicted, *measured]
            panel.scatter(
                measured, predicted, s=22, color=colours[SUBJECTS[name].family], alpha=0.8, linewidth=0, zorder=3
            )
        low, high = min(everything) / 1.5, max(everything) * 1.5
        panel.plot((low, high), (low, high), color=INK, linewidth=1, zorder=2)
        panel.fill_between(
            (low, high),
            *([edge * (1 + sign * model.LIMIT) for edge in (low, high)] for sign in (-1, 1)),
            color=GRID,
            zorder=1,
        )
        panel.set(
            xscale="log",
            yscale="log",
            xlim=(low, high),
            ylim=(low, high),
            xlabel="measured, ms",
            ylabel="predicted, ms",
        )
        panel.set_title(direction, fontsize=11, fontweight="bold", loc="left", color=INK)
        panel.set_aspect("equal")
        panel.tick_params(which="both", length=0, colors=MUTED)
        panel.spines[:].set_visible(False)
        panel.grid(color=GRID, linewidth=0.6, zorder=0)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colours[family]) for family in families]
    figure.legend(handles, families, loc="outside upper center", ncols=4, frameon=False)
    about = found["machine"]
    figure.supxlabel(
        f"sizes that had no part in the fit; grey: within {model.LIMIT:.0%}. {about['cpu']}, {about['threads']} threads, "
        f"{about['date'][:10]}",
        fontsize=8,
        color=MUTED,
    )
    figure.savefig(path, dpi=130, facecolor="white", format="png", metadata={"Software": None})
    plt.close(figure)


def _points(found: dict, name: str, direction: str) -> list[tuple[float, float]]:
    subject, samples = SUBJECTS[name], found["points"][name]
    prices = model.Fit(**found["fits"][name][direction])
    return [
        (1e3 * (1 + error) * seconds, 1e3 * seconds)
        for error, seconds in zip(
            prices.errors, (statistics.median(samples[key(size, direction)]) for size in subject.held_out)
        )
    ]
