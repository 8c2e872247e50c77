"""A picture of the ratios: a bar for each figure, and its goal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import AT_LEAST, Figure

GOOD, BAD, PLAIN = "#2a7f62", "#b3432b", "#7a8794"


def draw(figures: Sequence[Figure], machine: Sequence[str], path: Path) -> None:
    """Write a PNG with walproto's values divided by PostgreSQL's, their medians and spreads."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    shown = [figure for figure in _with_subjects(figures) if figure[1].theirs]
    if not shown:
        return
    chart, axes = pyplot.subplots(figsize=(11, 1.6 + 0.36 * len(shown)), layout="constrained")
    for row, (_, figure) in enumerate(shown):
        ratios = figure.ratios
        middle = statistics.median(ratios)
        colour = {"yes": GOOD, "NO": BAD}.get(figure.verdict, PLAIN)
        errors = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(row, middle, color=colour, height=0.6, xerr=errors, ecolor="#333333")
        if figure.goal is not None and figure.goal.of_ratio:
            sign = ">" if figure.goal.sign == AT_LEAST else "<"
            axes.plot(figure.goal.limit, row, marker=sign, color="black", markersize=8)
    axes.set_yticks(range(len(shown)), [f"{name} [{figure.unit}]" for name, figure in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("walproto / PostgreSQL (arrow: the goal, and the side to be on)")
    chart.suptitle("\n".join(machine), fontsize=8, x=0.01, ha="left")
    chart.savefig(path, dpi=110)


def _with_subjects(figures: Sequence[Figure]) -> list[tuple[str, Figure]]:
    """The figures with what they are of: an indented name goes on with the one before."""
    named, subject = [], ""
    for figure in figures:
        if figure.what.startswith("  "):
            named.append((f"{subject}: {figure.what.strip()}", figure))
        else:
            subject = figure.what.partition(":")[0]
            named.append((figure.what, figure))
    return named
