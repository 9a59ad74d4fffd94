"""Figures over seeds: every seed is a dot, and a line is their mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mingpt.analysis.figures import _new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLOR = "#0173b2"


def seed_dots(
    frame: DataFrame, rows: str, panels: str, title: str = "", value: str = "accuracy", n_columns: int = 5
) -> Figure:
    """Draw what each of some things comes to: a panel for each task, a row for each method, a dot for each seed.

    Args:
        frame: one result a row.
        rows: the column of what is compared, in the order of its first appearance.
        panels: the column that has a panel for each of its values.
        title: above the figure.
        value: the column that is drawn; "accuracy" in percent, anything else as it is.
        n_columns: panels side by side.
    """
    names, tasks = list(dict.fromkeys(frame[rows])), list(dict.fromkeys(frame[panels]))
    n_columns = min(n_columns, len(tasks))
    shape = (math.ceil(len(tasks) / n_columns), n_columns)
    size = (1.55 * n_columns + 1.4, shape[0] * (0.17 * len(names) + 0.7) + 0.5)
    figure, grid = _new_figure(size, title, shape, lines="both", sharey=True, sharex=True)
    heights = {name: -place for place, name in enumerate(names)}
    for ax, task in zip(grid.flat, tasks, strict=False):
        own: Any = frame[frame[panels] == task]
        y, x = own[rows].map(heights), own[value] * (100 if value == "accuracy" else 1)
        ax.scatter(x, y, s=14, color=COLOR, alpha=0.55, linewidths=0)
        means = x.groupby(y).mean()
        ax.scatter(means, means.index, marker="|", s=70, color="black", linewidths=1.4)
        ax.set_title(task, fontsize=8.5)
        ax.set_yticks(list(heights.values()), names, fontsize=8)
        ax.set_ylim(0.6 - len(names), 0.6)
        _axis(ax, value, "x")
    for place, ax in enumerate(grid.flat):
        ax.set_visible(place < len(tasks))
        ax.tick_params(labelbottom=place + n_columns >= len(tasks))  # the lowest of its column
    text = f"{_label(value)}; a dot is a seed, a bar their mean"
    figure.supxlabel(text.replace("; ", "\n") if n_columns == 1 else text, fontsize=9)
    return figure


def seed_lines(
    frame: DataFrame, x: str, lines: str, panels: str, title: str = "", value: str = "accuracy", label: str = ""
) -> Figure:
    """Draw how results change with a number: a panel for each task, a line for each kind, a dot for each seed.

    Args:
        frame, title, value: see ``seed_dots``.
        x: the column on the horizontal axis; its values are evenly spaced.
        lines: the column that has a line for each of its values.
        panels: the column that has a panel for each of its values.
        label: of the horizontal axis, the column's name by default.
    """
    import seaborn as sns

    tasks, names, steps = (list(dict.fromkeys(frame[each])) for each in (panels, lines, x))
    steps = sorted(steps)
    width = max(1.9, 0.11 * sum(len(f" {step:g}") for step in steps))
    size = (width * len(tasks) + 1.3, 2.7)
    figure, (grid,) = _new_figure(size, title, (1, len(tasks)), lines="both", sharey=True)
    for ax, task in zip(grid, tasks, strict=True):
        for name, color in zip(names, sns.color_palette("colorblind", len(names)), strict=True):
            own: Any = frame[(frame[panels] == task) & (frame[lines] == name)]
            ticks, scores = own[x].map(steps.index), own[value] * (100 if value == "accuracy" else 1)
            ax.scatter(ticks, scores, s=12, color=color, alpha=0.5, linewidths=0)
            means = scores.groupby(ticks).mean()
            ax.plot(means.index, means, color=color, linewidth=1.4, label=name)
        ax.set_xticks(range(len(steps)), [f"{step:g}" for step in steps], fontsize=8)
        ax.set_xlabel(label or x)
        ax.set_title(task, fontsize=8.5)
        _axis(ax, value, "y")
    grid[0].set_ylabel(_label(value))
    if len(names) > 1:
        grid[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    return figure


def _axis(ax: Axes, value: str, axis: str) -> None:
    if value == "accuracy":
        ax.set(**{f"{axis}lim": (-4, 104)})


def _label(value: str) -> str:
    return {"accuracy": "accuracy in percent", "loss": "loss in nats"}.get(value, value)
