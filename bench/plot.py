"""The picture of a run: time of everyone relative to PyTorch's unmasked attention, one panel per dtype."""

from __future__ import annotations

from .cases import OURS, UNMASKED

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = {
    OURS: "#0f766e",
    "torch sdpa": "#8b9bb4",
    "flex": "#a7b4c8",
    "sdpa on windows": "#b6c2d3",
    "torch.compile": "#c5cedb",
    "eager tuned": "#d3dae4",
    "eager": "#dfe4ec",
}
NAMES = {
    OURS: "effattn",
    "flex": "FlexAttention",
    "eager": "eager formula",
    "eager tuned": "eager, tuned",
    "torch sdpa": "F.scaled_dot_product_attention",
    "sdpa on windows": "SDPA on cut windows",
}
OPERATORS = {
    "gaussian_mixture": "Gaussian-mixture attention",
    "masked_product": "Free-mask attention (ELM)",
    "plain": "Plain attention",
    "additive mask (1,H,N,N)": "Attention with a dense additive mask",
    "additive mask (H,N,N)": "Attention with a per-head additive mask",
    "boolean mask": "Attention with a boolean mask",
    "causal": "Causal attention",
    "cross_shaped_window": "Cross-shaped window attention (CSWin)",
    "shifted_window": "Shifted window attention (Swin, HAT)",
    "overlapping_window": "Overlapping window attention (HAT)",
}
TITLES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def draw(report: dict, path: str) -> None:
    """Write a PNG of ``report`` (the JSON of a run): one operator in one direction, all dtypes and shapes that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(report)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    by_dtype = [[row for row in rows if row["dtype"] == dtype] for dtype in dtypes]
    contenders = [name for name in COLOURS if any(_ms(row, name) for row in rows)]
    tallest = max(len(group) for group in by_dtype)
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    height = 1.7 + tallest * (0.2 * len(contenders) + 0.3)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(6.0 * len(dtypes) + 0.6, height), sharey=True, squeeze=False, layout="constrained"
    )
    limit = max(_relative(row, name) for row in rows for name in contenders)
    for panel, dtype, group in zip(panels[0], dtypes, by_dtype):
        _panel(panel, TITLES[dtype], group, contenders, limit)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in contenders]
    labels = [NAMES.get(name, name) for name in contenders]
    operator, direction = rows[0]["operator"], rows[0]["direction"]
    about = report["machine"]
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(contenders), frameon=False)
    legend.set_title(
        f"{OPERATORS.get(operator, operator)}, {direction}: time relative to PyTorch's unmasked attention",
        prop={"size": 13, "weight": "bold"},
    )
    figure.supxlabel(
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date'][:10]}, "
        f"commit {about['commit'] or '-'}; medians of interleaved runs, logarithmic scale",
        fontsize=8,
        color=MUTED,
    )
    figure.savefig(path, dpi=160, facecolor="white", format="png")
    plt.close(figure)


def _rows(report: dict) -> list[dict]:
    """Rows of one operator and direction that can be put over the unmasked time."""
    usable = [row for row in report["rows"] if _baseline(row) and _ms(row, OURS)]
    if not usable:
        raise ValueError("nothing to draw: no row has both our time and that of unmasked attention")
    # A family's namesake before its variants, plain attention last, forward before backward.
    first = max(usable, key=lambda row: (row["operator"] == row["family"], row["direction"] == "forward"))
    return [row for row in usable if (row["operator"], row["direction"]) == (first["operator"], first["direction"])]


def _ms(row: dict, name: str) -> float:
    return row["results"].get(name, {}).get("ms") or 0.0


def _baseline(row: dict) -> float:
    """Stock attention without a mask; of plain attention that is the peer itself."""
    return _ms(row, UNMASKED) or (_ms(row, "torch sdpa") if row["operator"] == "plain" else 0.0)


def _relative(row: dict, name: str) -> float:
    return _ms(row, name) / _baseline(row)


def _panel(panel, title: str, rows: list[dict], contenders: list[str], limit: float) -> None:
    bar = 0.8 / len(contenders)
    for index, row in enumerate(rows):
        for place, name in enumerate(contenders):
            if not _ms(row, name):
                continue
            value, y = _relative(row, name), index - 0.4 + bar * (place + 0.5)
            ours = name == OURS
            # Bars grow from 1, unmasked attention: to the left is faster than it, to the right slower.
            panel.barh(y, value - 1, left=1, height=0.88 * bar, color=COLOURS[name], zorder=2)
            text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
            weight, colour = ("bold", COLOURS[OURS]) if ours else ("normal", MUTED)
            side, gap = ("left", 1.03) if value >= 1 else ("right", 0.97)
            panel.text(value * gap, y, text, ha=side, va="center", fontsize=8.5, fontweight=weight, color=colour)
    panel.axvline(1, color=INK, linewidth=1.2, zorder=3)
    panel.set_xscale("log")
    panel.set_xlim(0.3, limit * 1.6)
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64) if 0.3 <= t <= limit * 1.3]
    panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    panel.minorticks_off()
    panel.set_yticks(range(len(rows)), [_label(row) for row in rows])
    panel.set_ylim(len(rows) - 0.45, -0.55)
    panel.tick_params(axis="both", length=0, colors=INK)
    panel.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.set_title(title, fontsize=11, fontweight="bold", loc="left", color=INK)
    panel.set_xlabel("1x is unmasked F.scaled_dot_product_attention; left of it is faster", color=MUTED, fontsize=9)


def _label(row: dict) -> str:
    _, _, tokens, _ = row["shape"]
    detail = row["case"].partition(" ")[2]
    return f"{tokens} tokens\n{detail or 'x'.join(map(str, row['shape']))}"
