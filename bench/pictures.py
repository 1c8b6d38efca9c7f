"""Pictures of the report: a family's times over growing lengths, and the summary of all families."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import median

from effattn._files import write_atomically

from .cases import OURS, UNMASKED, Family, Sweep
from .plot import COLOURS, GRID, INK, MUTED, NAMES
from .standing import DIRECTIONS, Newest, Standing, timed

FEWEST = 3  # lengths that make a line
OWN = COLOURS[OURS]
EAGER, LOSS = "#d9b98a", "#b91c1c"
KINDS = {  # a contender's colour says what kind of program it is
    "eager": "#d97706",
    "published": "#d97706",
    "eager chunks": "#d97706",
    "eager shift": "#d97706",
    "torch.fft": "#d97706",
    "eager tuned": "#a16207",
    "eager parallel": "#a16207",
    "torch.compile": "#7c3aed",
    "compile chunks": "#7c3aed",
    "published, compiled": "#7c3aed",
    "flex": "#2563eb",
    "torch sdpa": "#be185d",
    "sdpa on windows": "#be185d",
    "sdpa + bias": "#be185d",
    "sdpa + log sizes": "#be185d",
    "F.linear": "#be185d",
    "F.linear bf16": "#f472b6",
    "torch int8": "#0369a1",
    "effattn int8": "#34d399",
    UNMASKED: "#6b7280",
    "sdpa causal": "#6b7280",
    "copy": "#6b7280",
}
FLOOR = "machine's limit"
PASSES = {"forward": "forward", "forward+backward": "forward + backward"}


def lines(sweep: Sweep, direction: str, rows: Newest) -> Newest:
    """The recorded rows of a sweep, by rising tokens."""
    wanted = {(case.operator, case.name) for case in sweep.cases}
    found = [
        (row, run)
        for row, run in rows
        if (row["operator"], row["case"]) in wanted
        and (row["direction"], row["dtype"]) == (direction, "float32")
        and timed(row)
    ]
    return sorted(found, key=lambda item: item[0]["shape"][2])


def passes(sweep: Sweep) -> tuple[str, ...]:
    """Directions in which it is measured."""
    return DIRECTIONS if sweep.trained else DIRECTIONS[:1]


def panels(family: Family, rows: Newest) -> list[tuple[Sweep, str, Newest]]:
    """What of the family has been measured at enough lengths to be drawn."""
    every = [
        (sweep, direction, lines(sweep, direction, rows)) for sweep in family.sweeps for direction in passes(sweep)
    ]
    return [panel for panel in every if len(panel[2]) >= FEWEST]


def draw_family(family: Family, rows: Newest, path: Path) -> None:
    """Time against tokens, both logarithmic, a line of panels for each sweep; ``panels(family, rows)`` must not be empty."""
    drawn = panels(family, rows)
    titles = list(dict.fromkeys(sweep.title for sweep, _, _ in drawn))
    directions = [name for name in DIRECTIONS if any(direction == name for _, direction, _ in drawn)]
    figure, axes = _figure(len(titles), len(directions), (7.4 * len(directions), 4.9 * len(titles) + 0.3))
    for axis in axes.flat:
        axis.set_axis_off()
    for sweep, direction, found in drawn:
        axis = axes[titles.index(sweep.title), directions.index(direction)]
        axis.set_axis_on()
        _panel(axis, sweep, direction, found)
    _sign(figure, [run for _, _, found in drawn for _, run in found])
    _save(figure, path)


def draw_summary(standings: list[Standing], rows: Newest, path: Path) -> None:
    """Bars of median ratios, from 1: to the left effattn is slower. Thin lines go from the least to the largest."""
    names = list(dict.fromkeys(standing.sweep.title for standing in standings))
    figure, axes = _figure(1, len(DIRECTIONS), (11.2, 1.5 + 0.58 * len(names)), sharey=True)
    values = [value for standing in standings for value in (*standing.eager, *standing.fastest)]
    for axis, direction in zip(axes.flat, DIRECTIONS):
        for standing in standings:
            if standing.direction == direction:
                y = names.index(standing.sweep.title)
                _bar(axis, y - 0.19, standing.fastest, OWN, OWN)
                _bar(axis, y + 0.19, standing.eager, EAGER, MUTED)
        axis.axvline(1, color=INK, linewidth=1.2, zorder=3)
        axis.set_xscale("log")
        axis.set_xlim(min(0.8, min(values) / 1.5), max(values) * 7)
        ticks = [
            t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(0.8, min(values)) <= t <= max(values) * 1.3
        ]
        axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        axis.set_yticks(range(len(names)), [textwrap.fill(name.split(",")[0], 27) for name in names])
        axis.set_ylim(len(names) - 0.45, -0.6)
        axis.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
        axis.set_title(PASSES[direction], fontsize=11, fontweight="bold", loc="left", color=INK)
    import matplotlib.pyplot as plt

    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (OWN, EAGER, LOSS)]
    labels = ["over the fastest peer measured", "over the published form in eager PyTorch", "the peer is faster"]
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    legend.set_title(
        "How many times faster effattn is: median over the recorded shapes, thin line from least to largest",
        prop={"size": 12.5, "weight": "bold"},
    )
    _sign(figure, [run for _, run in rows])
    _save(figure, path)


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _bar(axis, y: float, ratios: list[float], colour: str, ink: str) -> None:
    if not ratios:
        return
    value = median(ratios)
    losing = value < 1
    axis.barh(y, value - 1, left=1, height=0.34, color=LOSS if losing else colour, zorder=2)
    axis.plot((min(ratios), max(ratios)), (y, y), color=INK, linewidth=1, alpha=0.75, zorder=4)
    if min(ratios) < 1:
        axis.plot((min(ratios), 1), (y, y), color=LOSS, linewidth=2, zorder=5, solid_capstyle="butt")
    text = times(value) + (f"  ({times(min(ratios))} to {times(max(ratios))})" if len(ratios) > 1 else "")
    style = {"color": LOSS if losing else ink, "fontweight": "bold" if ink == OWN else "normal", "fontsize": 8.5}
    axis.annotate(text, (max(1, *ratios), y), (5, 0), textcoords="offset points", va="center", **style)


def _panel(axis, sweep: Sweep, direction: str, found: Newest) -> None:
    names = dict.fromkeys(name for row, _ in found for name in row["results"] if timed(row, name))
    names = [name for name in names if name not in sweep.without]
    lengths, ends = [row["shape"][2] for row, _ in found], []
    for name in names:
        points = [(r["shape"][2], r["results"][name]["ms"]) for r, _ in found if timed(r, name)]
        ours = name == OURS
        colour = OWN if ours else KINDS.get(name, INK)
        style = {"linewidth": 2.6 if ours else 1.5, "zorder": 4 if ours else 3, "markersize": 5.5 if ours else 4}
        dashes = (0, (4, 2)) if name in (UNMASKED, "sdpa causal", "copy") else "-"
        axis.plot(*zip(*points), color=colour, marker="o", linestyle=dashes, **style)
        ends.append((points, NAMES.get(name, name), colour, ours))
    floors = [(row["shape"][2], row["floor_ms"]) for row, _ in found if row["floor_ms"]]
    if floors:
        axis.plot(*zip(*floors), color=INK, linewidth=1.1, linestyle=":", zorder=2)
        ends.append((floors, FLOOR, INK, False))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n:,}".replace(",", " ") for n in lengths])
    axis.minorticks_off()
    times = [row["results"][name]["ms"] for row, _ in found for name in names if timed(row, name)]
    times += [ms for _, ms in floors]
    low, high = min(times), max(times)
    axis.set_ylim(low / 1.8, high * 1.8)
    axis.set_xlim(lengths[0] / 1.25, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.38)
    powers = range(math.floor(math.log10(low / 1.8)), math.ceil(math.log10(high * 1.8)) + 1)
    ticks = [10.0**power for power in powers if low / 1.8 <= 10.0**power <= high * 1.8]
    axis.set_yticks(ticks, [f"{t:g} ms" if t < 1000 else f"{t / 1000:g} s" for t in ticks])
    axis.grid(color=GRID, linewidth=0.8, zorder=0)
    axis.set_xlabel(sweep.axis, color=MUTED, fontsize=9.5)
    name, _, detail = sweep.title.partition(", ")
    axis.set_title(f"{name}, {PASSES[direction]}", fontsize=11, fontweight="bold", loc="left", color=INK, pad=20)
    axis.annotate(
        detail, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", color=MUTED, fontsize=9.5
    )
    _label_ends(axis, ends, lengths[-1])


def _label_ends(axis, ends: list, last: float) -> None:
    """Names beside the lines, moved apart where they would meet, each tied to its line's end.

    A line that ends early has its name where it would have gone on to.
    """
    low, high = (math.log(limit) for limit in axis.get_ylim())
    gap = (high - low) * 0.052
    usual = next((_slope(points) for points, _, _, ours in ends if ours), 1.0)
    heights = {id(end): _height(end[0], last, usual) for end in ends}
    ends = sorted(ends, key=lambda end: heights[id(end)])
    places = [min(high - gap / 2, heights[id(end)]) for end in ends]
    for _ in range(200):  # relax: neighbours that are too close push each other apart
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 0:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
        places[0] = max(places[0], low + gap / 2)
        places[-1] = min(places[-1], high - gap / 2)
    column = last * (axis.get_xlim()[1] / last) ** 0.12
    for (points, name, colour, ours), place in zip(ends, places):
        x, y = points[-1]
        axis.plot((x, column), (y, math.exp(place)), color=colour, linewidth=0.8, linestyle=":", zorder=1)
        weight = "bold" if ours else "normal"
        axis.text(column * 1.03, math.exp(place), name, color=colour, fontsize=9, fontweight=weight, va="center")


def _slope(points: list) -> float:
    (before, less), (x, y) = points[-2:]
    return math.log(y / less) / math.log(x / before)


def _height(points: list, last: float, usual: float) -> float:
    """Logarithm of a line's value at ``last``, carried on with its last slope; with the ``usual`` one of a single point."""
    x, y = points[-1]
    return math.log(y) + math.log(last / x) * (_slope(points) if len(points) > 1 else usual)


def _figure(rows: int, columns: int, size: tuple[float, float], **options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.spines[:].set_visible(False)
        axis.tick_params(axis="both", length=0, colors=INK, labelsize=9)
        axis.set_axisbelow(True)
    return figure, axes


def _sign(figure, runs: list) -> None:
    """Machine, dates and commits below the picture."""
    about = runs[0].about
    dates = sorted({run.about["date"][:10] for run in runs})
    commits = list(dict.fromkeys((run.about["commit"] or "-")[:7] for run in runs))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    which = f"commit {', '.join(commits)}" if len(commits) < 4 else f"{len(commits)} commits"
    figure.supxlabel(
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}, {when}, {which}; float32, "
        "medians of interleaved runs",
        fontsize=8,
        color=MUTED,
    )


def _save(figure, path: Path) -> None:
    """The same figure gives the same bytes: no date and no version of matplotlib inside."""
    import matplotlib.pyplot as plt

    options = {"dpi": 130, "facecolor": "white", "format": "png", "metadata": {"Software": None}}
    write_atomically(path, lambda name: figure.savefig(name, **options))
    plt.close(figure)
