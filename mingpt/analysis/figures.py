"""Every figure: attention maps, accuracy matrices, learning curves, what a prefix changes, accuracy by position.

Each function returns a matplotlib Figure, to be saved with ``figure.savefig(path)``. A notebook shows it where it is a
cell's last value; anywhere else in a cell, call ``display(figure)``. pyplot does not know these figures: no window
opens, nothing has to be closed and no global style changes. The colours are those of seaborn's colour-blind palette;
blue is with a prefix and grey without one.

Legend: H heads, L row length, P prefix positions, T = P + 2 L - 1 tokens that the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mingpt.evaluation import ConstraintEffect, Score
from mingpt.model import GPT
from mingpt.prefix import Prefix, Record
from mingpt.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

MAX_ANNOTATED_PANELS = 8
"""The most attention maps in one figure whose values are printed."""

PREFIX_COLORS = ("#0173B2", "#B8B8B8")
"""With a prefix, blue, and without one, grey."""

_OUTLINE = "#D55E00"  # vermilion
_Lines = Literal["x", "both"] | None  # of a grid behind the data
_MIN_FONT = 6.0  # points; smaller text is left out


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, all of it or nothing."""
    figure.savefig(content := BytesIO(), dpi=150)
    write_atomic(path, content.getvalue())


# ------------------------------------------------------------------------------------------------ attention


def attention_visualization(
    sample: Tensor,
    activations_record: Record,
    prefix_size: int,
    length: int,
    title: str = "",
    ignore_and_rescale_prefix: bool = False,
    annot: bool = True,
) -> Figure:
    """Draw what every head of every layer attends to: one row of maps for each layer, one column for each head.

    Args:
        sample: (P + 2 L,) or (1, P + 2 L) tokens: placeholders, input, output. The model did not read the last one.
        activations_record: what ``model(sample[None, :-1], activations_record=record)`` recorded: its "attention"
            entries are (1, H, T, T), one a layer, and the others are skipped. It is not changed.
        prefix_size: P.
        length: L.
        title: above the figure.
        ignore_and_rescale_prefix: leave the prefix positions out, and rescale the rest of each row to sum to 1.
        annot: print the values from 0.005 up, where there are at most ``MAX_ANNOTATED_PANELS`` maps and their cells
            are large enough.

    Raises:
        ValueError: if the record has no attention or that of several rows, or a shape does not fit the sizes.
    """
    from matplotlib.colors import PowerNorm

    maps, tokens = _attention_maps(sample, activations_record, prefix_size, length), sample.flatten().tolist()[:-1]
    if ignore_and_rescale_prefix:
        maps, tokens = maps[..., prefix_size:, prefix_size:], tokens[prefix_size:]
        sums = maps.sum(dim=-1, keepdim=True)  # 0 where a token attends to the prefix only
        maps, prefix_size = maps / sums.clamp(min=torch.finfo(maps.dtype).tiny), 0
    n_layers, n_heads, n_tokens, _ = maps.shape
    is_small = n_layers * n_heads <= MAX_ANNOTATED_PANELS
    panel = min(max(2.4, 0.17 * n_tokens), 8.0) if is_small else min(max(2.2, 0.085 * n_tokens), 3.0)  # inches
    cell = 72 * panel / n_tokens  # points
    size, shape = (n_heads * panel + 1.3, n_layers * panel + 0.8), (n_layers, n_heads)
    figure, grid = _new_figure(size, title, shape, sharex=True, sharey=True)
    edges = [0, prefix_size, prefix_size + length, n_tokens]
    is_later = np.triu(np.ones((n_tokens, n_tokens), dtype=bool), k=1)
    is_printed = (maps >= 0.005).numpy() & ~is_later & (annot and is_small and 0.5 * cell >= _MIN_FONT)
    for (layer, head), ax in np.ndenumerate(grid):
        weights = np.ma.array(maps[layer, head].numpy(), mask=is_later)
        # Not seaborn's heatmap, which draws the whole figure again for every panel.
        mesh = ax.pcolormesh(weights, cmap="YlGnBu", norm=PowerNorm(0.5, 0, 1), rasterized=True)
        for row, column in np.argwhere(is_printed[layer, head]):
            text, color = f"{weights[row, column]:.2f}", "white" if weights[row, column] > 0.45 else "black"
            style = {"ha": "center", "va": "center", "fontsize": min(8.0, 0.5 * cell), "color": color}
            ax.text(column + 0.5, row + 0.5, text.removeprefix("0")[:3], **style)
        for edge in {*edges} - {0, n_tokens}:
            ax.plot([0, edge, edge], [edge, edge, n_tokens], color="0.35", linewidth=0.6)
        # The triangle of later tokens is empty: room for the title, unless it is tiny.
        ax.set_title(f"L{layer + 1} H{head + 1}", loc="right", y=1.0, pad=-9 if n_tokens > 4 else 3, fontsize=8)
        ax.spines[:].set_visible(False)
    grid[0, 0].set_ylim(n_tokens, 0)
    _label_tokens(grid, list(map(str, tokens)), edges, cell)
    figure.supxlabel("attended token")
    figure.supylabel("attending token")
    label = "attention, rescaled" if ignore_and_rescale_prefix else "attention"
    shrink, pad = min(1.0, 2.5 / (n_layers * panel)), 0.15 / figure.get_figwidth()
    _tidy(figure.colorbar(mesh, ax=grid, label=label, shrink=shrink, pad=pad, anchor=(0, 1)).ax)
    return figure


def attention_maps(
    model: GPT, x: Tensor, length: int, prefix: Tensor | Prefix | None = None, title: str = "", **options: Any
) -> tuple[Figure, list[Tensor]]:
    """Run one row through a model and draw what every head attends to.

    Args:
        model: a GPT, in evaluation mode.
        x: (1, P + 2 L - 1) of int64, a row with its solution, as the model reads it.
        length: L.
        prefix: see ``GPT.forward``; it may have other positions than it has placeholders.
        title: above the figure.
        options: of ``attention_visualization``.

    Returns:
        The figure, and each layer's attention among the content rescaled to sum to 1, (H, T, T) on the CPU.
    """
    record: Record = []
    with torch.no_grad():
        model(x, prefixes=prefix, activations_record=record)
    attention = [each[0].cpu() for name, each in record if name == "attention"]
    size = attention[0].shape[-1] - (2 * length - 1)
    sample = torch.cat([x.new_zeros(size), x[0, 1 - 2 * length :], x.new_zeros(1)]).cpu()  # the last token is not read
    content = [each[:, size:, size:] for each in attention]
    figure = attention_visualization(sample, record, size, length, title, **options)
    return figure, [each / each.sum(dim=-1, keepdim=True) for each in content]


def _attention_maps(sample: Tensor, activations_record: Record, prefix_size: int, length: int) -> Tensor:
    """The record's attention, (layers, H, T, T) of float32, after a check of every size."""
    n_tokens = prefix_size + 2 * length - 1
    layers = [tensor.detach().float().cpu() for name, tensor in activations_record if name == "attention"]
    shapes = {tuple(layer.shape) for layer in layers}
    expected = {(1, *shape[1:2], n_tokens, n_tokens) for shape in shapes}
    if sample.numel() != n_tokens + 1 or len(shapes) != 1 or shapes != expected:
        sizes = f"prefix_size = {prefix_size} and length = {length} make a sample of {n_tokens + 1} tokens"
        maps = f"one row's 'attention' (1, heads, {n_tokens}, {n_tokens}) for each layer, with the same heads in all"
        advice = "record it with model(sample[None, :-1], activations_record=...)"
        raise ValueError(f"{sizes} and {maps}; got {tuple(sample.shape)} and {sorted(shapes)}; {advice}")
    return torch.cat(layers)


def _label_tokens(grid: np.ndarray, tokens: Sequence[str], edges: Sequence[int], cell: float) -> None:
    """Name the content tokens along shared axes, and next to them the groups prefix, input and output between edges."""
    n_letters = max(map(len, tokens))
    per_cell = cell * min(0.72, 1.25 / n_letters)  # points of the largest text that fits into a cell
    step = math.ceil(_MIN_FONT / per_cell)  # long rows have a label at every step-th token
    fontsize = min(8.0, step * per_cell)
    labelled = range(edges[1], len(tokens), step)
    groups = [("prefix", *edges[0:2]), ("input", *edges[1:3]), ("output", *edges[2:4])]
    middles = {name: (start + end) / 2 for name, start, end in groups if end > start}
    for axis in (grid[0, 0].xaxis, grid[0, 0].yaxis):
        axis.set_ticks([token + 0.5 for token in labelled], [tokens[token] for token in labelled])
        axis.set_ticks(list(middles.values()), list(middles), minor=True)
    for ax in grid.flat:
        ax.tick_params(labelsize=fontsize, length=0)
        ax.tick_params(which="minor", labelsize=8, length=0, pad=4 + 0.7 * max(2, n_letters) * fontsize)
        ax.tick_params(which="minor", axis="y", labelrotation=90)
        ax.xaxis.remove_overlapping_locs = ax.yaxis.remove_overlapping_locs = False  # a middle may be a token's


# ----------------------------------------------------------------------------------------------- accuracies


def accuracy_matrix_figure(matrix: DataFrame, title: str = "", rows: str = "prefix") -> Figure:
    """Draw the accuracy of every prefix on every task, in percent, with an outline where the names are the same.

    Args:
        matrix: a ``Score``, or an accuracy from 0 to 1, in each cell; prefixes by tasks.
        title: above the figure.
        rows: what the matrix's rows are.

    Raises:
        ValueError: if the matrix is empty.
    """
    from matplotlib.patches import Rectangle

    shares = matrix.map(lambda cell: getattr(cell, "accuracy", cell))
    figure, ax = _percent_heatmap(shares, title, "accuracy", 100)
    is_own = np.equal.outer(matrix.index.to_numpy(), matrix.columns.to_numpy())
    for row, column in np.argwhere(is_own):
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=_OUTLINE, linewidth=1.6, clip_on=False))
    ax.set_xticks(ax.get_xticks(), matrix.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(xlabel="task", ylabel=rows)
    if is_own.any():
        figure.supxlabel("Outlined: the prefix on the task it is named after.", fontsize=8)
    return figure


def position_accuracy_figure(scores: Mapping[str, Score], title: str = "") -> Figure:
    """Draw how many rows are right up to each output position, in percent: a row for each score, columns 1 to L.

    Args:
        scores: by name, each with ``by_position`` of the same length.
        title: above the figure.

    Raises:
        ValueError: if there are no scores, or their positions are missing or differ in number.
    """
    return _position_heatmap({name: score.by_position for name, score in scores.items()}, title, "accuracy", 100)


def forbidden_mass_figure(effects: Mapping[str, ConstraintEffect], title: str = "") -> Figure:
    """Draw how much probability constraints took away at each output position: one row for each effect.

    Args:
        effects: by name, each with a ``forbidden_mass`` of the same length.
        title: above the figure.

    Raises:
        ValueError: if there are no effects, or their lengths differ.
    """
    return _position_heatmap({name: each.forbidden_mass for name, each in effects.items()}, title, "forbidden mass")


def _position_heatmap(shares: Mapping, title: str, label: str, highest: float | None = None) -> Figure:
    """A heatmap of shares, 0 to 1, at each output position, one row for each name."""
    from pandas import DataFrame

    frame = DataFrame(shares).T
    frame.columns += 1
    figure, ax = _percent_heatmap(frame, title, label, highest)
    ax.set_xlabel("output position")
    return figure


def _percent_heatmap(shares: DataFrame, title: str, label: str, highest: float | None) -> tuple[Figure, Axes]:
    """A figure of shares, 0 to 1, in percent, their colours from 0 to ``highest``, by default the highest of them."""
    if shares.empty:
        raise ValueError(f"there must be at least one row and one column to draw, got {shares.shape}")
    widest, tallest = (max(len(str(name)) for name in names) for names in shares.axes)
    width, height = 0.42 * shares.shape[1] + 0.075 * widest + 1.2, 0.26 * shares.shape[0] + 0.05 * tallest + 1.4
    figure, ((ax,),) = _new_figure((max(width, 5.0), max(height, 2.1)), title)
    _heatmap(ax, 100 * shares, ".1f", highest, f"{label} in percent")
    return figure, ax


def paired_bars(
    with_prefix: Mapping[str, Score],
    without_prefix: Mapping[str, Score],
    groups: Mapping[str, Sequence[str]],
    title: str = "",
    labels: tuple[str, str] = ("with its prefix", "without prefix"),
    colors: tuple[str, str] = PREFIX_COLORS,
) -> Figure:
    """Draw the accuracy on each task with and without its prefix, with 95% intervals.

    Args:
        with_prefix: the scores by task.
        without_prefix: the same model's without a prefix.
        groups: the tasks to draw, from top to bottom, by the name of their group, which is no task's.
        title: above the figure.
        labels: what the two scores are, where it is another comparison.
        colors: of the two scores; another comparison should not be blue and grey.

    Raises:
        KeyError: if a score of a task is missing.
    """
    names = [name for group, members in groups.items() for name in (group, *members)]
    y = np.array([number for number, name in enumerate(names) if name not in groups])
    figure, ((ax,),) = _new_figure((6.6, 0.3 * len(names) + 1.2), title, lines="x")
    for label, scores, color, offset in zip(labels, (with_prefix, without_prefix), colors, (-0.2, 0.2), strict=True):
        accuracies, errors = _percent_and_errors(scores[names[number]] for number in y)
        style = {"elinewidth": 0.8, "capsize": 1.5, "ecolor": "0.15"}
        bars = ax.barh(y + offset, accuracies, height=0.4, color=color, label=label, xerr=errors, error_kw=style)
        ax.bar_label(bars, fmt="%.1f", padding=3, fontsize=6.5)
    ax.set_yticks(range(len(names)), names)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    ax.set(xlim=(0, 110), ylim=(len(names) - 0.3, -0.6), xlabel="accuracy in percent, with its 95% interval")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def validation_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str = "") -> Figure:
    """Draw how accuracy grows while prefixes are trained: a panel for each task, a line for each kind of prefix.

    Args:
        panels: by task and by kind, pairs of iteration and accuracy, 0 to 1.
        title: above the figure.
    """
    import seaborn as sns

    shape = (1, len(panels))
    figure, (grid,) = _new_figure((2.5 * len(panels) + 1.0, 2.8), title, shape, lines="both", sharey=True)
    for ax, (task, curves) in zip(grid, panels.items(), strict=True):
        for (kind, curve), color in zip(curves.items(), sns.color_palette("colorblind"), strict=False):
            ax.plot([x for x, _ in curve], [100 * y for _, y in curve], color=color, linewidth=1.3, label=kind)
        ax.set(xlabel="iteration", ylim=(-3, 103))
        ax.set_title(task, fontsize=9)
    grid[0].set_ylabel("accuracy in percent")
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def _percent_and_errors(scores: Iterable[Score]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies in percent, (N,), and how far their 95% intervals reach below and above, (2, N)."""
    accuracy, low, high = 100 * np.array([(score.accuracy, *score.confidence_interval) for score in scores]).T
    return accuracy, np.maximum(0, [accuracy - low, high - accuracy])


# ------------------------------------------------------------------------------------------ training and analysis


def learning_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], title: str = "", floor: float | None = None
) -> Figure:
    """Draw the loss, on a logarithmic scale, against the iteration.

    Args:
        curves: by name, the lines of a metrics file: each has "iter" and "loss" (nats a token).
        title: above the figure.
        floor: the loss of the best possible predictor, drawn as a line; 0 has no place on this scale.

    Raises:
        KeyError: if a line lacks "iter" or "loss".
    """
    import seaborn as sns
    from matplotlib.ticker import LogLocator
    from pandas import DataFrame

    rows = [(line["iter"], line["loss"], name) for name, lines in curves.items() for line in lines]
    frame = DataFrame(rows, columns=["iteration", "loss", "curve"])
    figure, ((ax,),) = _new_figure((6.4, 3.8), title, lines="both")
    dashes = "curve" if len(curves) > 10 else None  # where the palette's colours do not suffice
    style = {"hue": "curve", "style": dashes, "palette": sns.color_palette("colorblind", len(curves))}
    sns.lineplot(frame, x="iteration", y="loss", estimator=None, sort=False, linewidth=1.3, ax=ax, **style)
    if floor is not None:
        ax.axhline(floor, color="0.35", linestyle=":", linewidth=1.2, label=f"best possible, {floor:.3g}")
    ax.set(yscale="log", ylabel="loss (nats a token)")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    _legend_at_right(ax)
    return figure


def pca_figure(points: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw sets of vectors as points in the plane in which they vary most, their first two principal components.

    Args:
        points: by name, (N, C) each; of the same C.
        title: above the figure.
    """
    import seaborn as sns

    vectors = torch.cat([each.detach().double().cpu() for each in points.values()]).numpy()
    vectors = vectors - vectors.mean(axis=0)
    _, spread, axes = np.linalg.svd(vectors, full_matrices=False)
    shares = 100 * spread[:2] ** 2 / (spread**2).sum()
    x, y = axes[:2] @ vectors.T
    names = [name for name, each in points.items() for _ in each]
    figure, ((ax,),) = _new_figure((5.6, 4.0), title, lines="both")
    sns.scatterplot(x=x, y=y, hue=names, palette="colorblind", s=9, alpha=0.6, linewidth=0, ax=ax)
    ax.set(xlabel=f"first component, {shares[0]:.1f}% of the variance", ylabel=f"second component, {shares[1]:.1f}%")
    ax.set_aspect("equal", adjustable="datalim")
    _legend_at_right(ax)
    return figure


def head_heatmap(values: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw numbers for every layer and head as heatmaps side by side, each on its own scale from 0.

    Args:
        values: (L, H) each, not negative, by what they are.
        title: above the figure.
    """
    from pandas import DataFrame

    n_layers, n_heads = next(iter(values.values())).shape
    size = (len(values) * (max(0.5 * n_heads, 2.8) + 0.5), 0.32 * n_layers + 1.3)
    figure, (grid,) = _new_figure(size, title, (1, len(values)))
    for ax, (name, each) in zip(grid, values.items(), strict=True):
        frame = DataFrame(each.cpu().numpy(), range(1, n_layers + 1), range(1, n_heads + 1))
        _heatmap(ax, frame, ".2f" if each.is_floating_point() else "d")
        ax.set(xlabel="head", ylabel="layer")
        ax.set_title(name, fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------- shared parts


def _new_figure(
    size: tuple[float, float], title: str, shape: tuple[int, int] = (1, 1), lines: _Lines = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches with a title and tidy, empty axes, (rows, columns); options of its subplots."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A Figure that IPython can show without pyplot and before ``%matplotlib inline``."""

        def _repr_png_(self) -> bytes:
            self.savefig(buffer := BytesIO(), format="png")
            return buffer.getvalue()

    figure = NotebookFigure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=min(max(11, 0.8 * size[0]), 130 * size[0] / len(title)))
    grid = figure.subplots(*shape, squeeze=False, **options)
    for ax in grid.flat:
        _tidy(ax, lines)
    return figure, grid


def _heatmap(ax: Axes, frame: DataFrame, fmt: str, highest: float | None = None, bar_label: str = "") -> None:
    """Draw a table of numbers from 0 to ``highest`` as annotated cells, with a colour bar if that has a label."""
    import seaborn as sns

    style = {"annot": True, "annot_kws": {"fontsize": 7}, "linewidths": 0.5, "xticklabels": True, "yticklabels": True}
    bar = {"cbar": bool(bar_label), "cbar_kws": {"label": bar_label}}
    sns.heatmap(frame, vmin=0, vmax=highest, cmap="Blues", fmt=fmt, ax=ax, **style, **bar)
    ax.tick_params(length=0, labelrotation=0)
    for each in ax.figure.axes:  # with the colour bar's
        _tidy(each)


def _tidy(ax: Axes, lines: _Lines = None) -> None:
    """Small text, no frame at the top and the right, and a pale grid of lines behind the data."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_fontsize(9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    if lines is not None:
        ax.set_axisbelow(True)
        ax.grid(axis=lines, color="0.92", linewidth=0.6)


def _legend_at_right(ax: Axes) -> None:
    """A legend of everything that has a label, outside of the axes."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8, markerscale=2)
