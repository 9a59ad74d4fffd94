"""Every figure: attention maps, accuracy matrices, learning curves, what a prefix changes, accuracy by position.

Each function returns a matplotlib Figure, to be saved with ``figure.savefig(path)``. In a notebook it is shown once,
whether or not it is the cell's last value. Colours are told apart by the colour-blind too, and no global style changes.

Legend: H heads, L row length, P prefix positions, T = P + 2 L - 1 tokens that the model reads.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from mingpt.evaluation import AccuracyMatrix, ConstraintEffect, Score

MAX_ANNOTATED_PANELS = 8
"""The most attention maps in one figure whose values are printed."""

_DARK, _ACCENT, _PALE = "#0173B2", "#D55E00", "#B8B8B8"  # blue, vermilion and grey, apart for every kind of eye


# ------------------------------------------------------------------------------------------------ attention


def attention_visualization(
    sample: Tensor,
    activations_record: Iterable[tuple[str, Tensor]],
    prefix_size: int,
    length: int,
    title: str = "",
    ignore_and_rescale_prefix: bool = False,
    annot: bool = True,
) -> Figure:
    """Draw what every head of every layer attends to: one row of maps for each layer, one column for each head.

    Args:
        sample: (P + 2 L,) or (1, P + 2 L) tokens: prefix places, input, output; the last one the model did not read.
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
    tokens = [str(token) for token in sample.flatten().tolist()][:-1]
    layers = _attention_layers(sample, activations_record, prefix_size, length)
    if ignore_and_rescale_prefix:
        layers, tokens = [_without_prefix(layer, prefix_size) for layer in layers], tokens[prefix_size:]
        prefix_size = 0
    n_layers, n_heads, n_tokens = len(layers), len(layers[0]), len(tokens)
    is_small = n_layers * n_heads <= MAX_ANNOTATED_PANELS
    panel = min(max(2.4, 0.16 * n_tokens), 8.0) if is_small else min(max(2.2, 0.085 * n_tokens), 3.0)  # inches
    cell = 72 * panel / n_tokens  # points
    figure = _new_figure(n_heads * panel + 1.3, n_layers * panel + 0.8, title)
    grid = figure.subplots(n_layers, n_heads, squeeze=False)
    is_later = np.triu(np.ones((n_tokens, n_tokens), dtype=bool), k=1)
    for layer, heads in enumerate(layers):
        for head, weights in enumerate(heads):
            ax = grid[layer, head]
            is_blank = is_later | (weights < 0.005) | (not annot or not is_small or cell < 9)
            texts = np.where(is_blank, "", np.char.lstrip(np.char.mod("%.2f", weights), "0"))
            _heatmap(ax, np.ma.array(weights, mask=is_later), 1.0, texts, "YlGnBu", min(8.0, 0.44 * cell))
            for edge in {prefix_size, prefix_size + length} - {0, n_tokens}:
                ax.plot([0, edge, edge], [edge, edge, n_tokens], color="0.35", linewidth=0.6)
            # The triangle of later tokens is empty: room for the title, unless it is tiny.
            ax.set_title(f"L{layer + 1} H{head + 1}", loc="right", y=1.0, pad=-9 if n_tokens > 4 else 3, fontsize=8)
    edges = [0, prefix_size, prefix_size + length, n_tokens]
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
    for ax in grid[-1]:
        _label_tokens(ax.xaxis, tokens, edges, cell)
    for ax in grid[:, 0]:
        _label_tokens(ax.yaxis, tokens, edges, cell, rotation=90, va="center")
    figure.supxlabel("attended token", fontsize=max(9, 0.65 * figure.get_figwidth()))
    figure.supylabel("attending token", fontsize=max(9, 0.65 * figure.get_figwidth()))
    label = "attention, rescaled" if ignore_and_rescale_prefix else "attention"
    _add_colorbar(figure, grid, label, shrink=min(1.0, 2.5 / (n_layers * panel)))
    return figure


def _attention_layers(
    sample: Tensor, activations_record: Iterable[tuple[str, Tensor]], prefix_size: int, length: int
) -> list[np.ndarray]:
    """The record's attention, (H, T, T) for each layer, after a check of every size."""
    if prefix_size < 0 or length < 1:
        raise ValueError(f"prefix_size must be at least 0 and length at least 1, got {prefix_size} and {length}")
    n_tokens = prefix_size + 2 * length - 1
    if tuple(sample.shape) not in {(n_tokens + 1,), (1, n_tokens + 1)}:
        raise ValueError(
            f"sample must be one row of prefix_size + 2 * length = {n_tokens + 1} tokens, got {tuple(sample.shape)}"
        )
    record = list(activations_record)
    layers = [tensor for name, tensor in record if name == "attention"]
    if not layers:
        raise ValueError(
            f"the record must have 'attention' entries, got {sorted({name for name, _ in record})}; "
            "pass the list that model(tokens, activations_record=...) has filled"
        )
    for number, layer in enumerate(layers, start=1):
        shape = tuple(layer.shape)
        if layer.ndim == 4 and len(layer) != 1:
            raise ValueError(f"the record must be of one row, got {len(layer)}; record model(sample[None, :-1], ...)")
        if layer.ndim != 4 or shape[2:] != (n_tokens, n_tokens) or shape[1] != layers[0].shape[1] or not shape[1]:
            raise ValueError(
                f"attention entry {number} must be (1, heads, {n_tokens}, {n_tokens}), the square of prefix_size + "
                f"2 * length - 1 tokens, with the same heads in each layer; got {shape}"
            )
    return [layer[0].detach().float().cpu().numpy() for layer in layers]


def _without_prefix(attention: np.ndarray, prefix_size: int) -> np.ndarray:
    """(H, T, T) to (H, T - P, T - P), each row rescaled to sum to 1; a row that looks at the prefix only stays 0."""
    content = attention[:, prefix_size:, prefix_size:]
    sums = content.sum(axis=-1, keepdims=True)
    return np.divide(content, sums, out=np.zeros_like(content), where=sums > 0)


def _label_tokens(axis: Axis, tokens: Sequence[str], edges: Sequence[int], cell: float, **group_style: Any) -> None:
    """Name the content tokens along an axis, and next to them the groups prefix, input and output between edges."""
    n_letters = max(map(len, tokens))
    per_cell = cell * min(0.72, 1.4 / n_letters)  # points of the largest text that fits into a cell
    step = math.ceil(3.4 / per_cell)  # long rows have a label at every step-th token
    fontsize = min(8.0, step * per_cell)
    places = range(edges[1], len(tokens), step)
    spans = zip(("prefix", "input", "output"), edges, edges[1:], strict=False)
    groups = {name: (start + end) / 2 for name, start, end in spans if end > start}
    axis.remove_overlapping_locs = False  # a group's middle may be a token's place
    axis.set_ticks([place + 0.5 for place in places], [tokens[place] for place in places], fontsize=fontsize)
    axis.set_ticks(list(groups.values()), list(groups), minor=True, fontsize=8, **group_style)
    axis.set_tick_params(which="minor", pad=4 + 0.7 * max(2, n_letters) * fontsize)


# ----------------------------------------------------------------------------------------------- accuracies


def accuracy_matrix_figure(matrix: AccuracyMatrix, title: str = "", rows: str = "prefix") -> Figure:
    """Draw the accuracy of every prefix on every task, in percent, with an outline where the names are the same.

    Args:
        matrix: the scores, prefixes by tasks.
        title: above the figure.
        rows: what the matrix's rows are.

    Raises:
        ValueError: if the matrix is empty or its rows have not one score for each task.
    """
    from matplotlib.patches import Rectangle

    shape = (len(matrix.prefixes), len(matrix.tasks))
    if 0 in shape or [len(row) for row in matrix.scores] != [shape[1]] * shape[0]:
        raise ValueError(f"the matrix must have scores for {shape[0]} prefixes by {shape[1]} tasks, at least one each")
    figure, ax = _percent_heatmap(matrix.prefixes, matrix.tasks, matrix.accuracies, title)
    for row, prefix in enumerate(matrix.prefixes):
        for column, task in enumerate(matrix.tasks):
            if prefix == task:
                outline = Rectangle((column, row), 1, 1, fill=False, edgecolor=_ACCENT, linewidth=1.6, clip_on=False)
                ax.add_patch(outline)
    ax.set_xticks(ax.get_xticks(), matrix.tasks, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_xlabel("task", fontsize=9)
    ax.set_ylabel(rows, fontsize=9)
    counts = sorted({score.n_rows for row in matrix.scores for score in row})
    n_rows = " to ".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)])
    outlined = (
        " Outlined: the prefix on the task it is named after." if set(matrix.prefixes) & set(matrix.tasks) else ""
    )
    figure.supxlabel(f"{n_rows} rows a cell.{outlined}", fontsize=8)
    return figure


def position_accuracy_figure(scores: Mapping[str, Score], title: str = "") -> Figure:
    """Draw how often each output position is right, in percent: one row for each score, columns 1 to L.

    Args:
        scores: by name, each with ``by_position`` of the same length.
        title: above the figure.

    Raises:
        ValueError: if there are no scores, or their positions are missing or differ in number.
    """
    accuracies = {name: score.by_position for name, score in scores.items()}
    return _position_heatmap(accuracies, "scores must have by_position", title, "accuracy in percent")


def forbidden_mass_figure(effects: Mapping[str, ConstraintEffect], title: str = "") -> Figure:
    """Draw how much probability constraints took away at each output position: one row for each effect.

    Args:
        effects: by name, all of the same length.
        title: above the figure.

    Raises:
        ValueError: if there are no effects, or their lengths differ.
    """
    forbidden_masses = {name: effect.forbidden_mass for name, effect in effects.items()}
    return _position_heatmap(
        forbidden_masses, "effects must have a forbidden_mass", title, "forbidden probability in percent"
    )


def paired_bars(
    with_prefix: Mapping[str, Score],
    without_prefix: Mapping[str, Score],
    groups: Mapping[str, Sequence[str]],
    title: str = "",
    labels: tuple[str, str] = ("with its prefix", "without prefix"),
) -> Figure:
    """Draw the accuracy on each task with and without its prefix, with 95% intervals.

    Args:
        with_prefix: the scores by task.
        without_prefix: the same model's without a prefix.
        groups: the tasks to draw, from top to bottom, by the name of their group.
        title: above the figure.
        labels: what the two scores are, where it is another comparison.

    Raises:
        ValueError: if no tasks are named, or a score of one is missing.
    """
    tasks = [task for members in groups.values() for task in members]
    missing = sorted({task for task in tasks if task not in with_prefix or task not in without_prefix})
    if missing or not tasks:
        raise ValueError(f"groups must name tasks that have a score with and without prefix; without one: {missing}")
    ticks: list[tuple[float, str, bool]] = []  # place, label, is a group's name
    for group, members in groups.items():
        start = ticks[-1][0] + 1.3 if ticks else 0.0
        ticks.append((start, group, True))
        ticks += [(start + offset, task, False) for offset, task in enumerate(members, start=1)]
    places = np.array([place for place, _, is_group in ticks if not is_group])
    figure = _new_figure(6.6, 0.3 * ticks[-1][0] + 1.5, title)
    ax = figure.subplots()
    for label, scores, offset, color in (
        (labels[0], with_prefix, -0.2, _DARK),
        (labels[1], without_prefix, 0.2, _PALE),
    ):
        percent = 100 * np.array([(scores[task].accuracy, *scores[task].confidence_interval) for task in tasks])
        accuracy, low, high = percent.T
        errors = np.maximum(0, [accuracy - low, high - accuracy])
        error_style = {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8, "ecolor": "0.15"}
        ax.barh(places + offset, accuracy, height=0.4, color=color, label=label, xerr=errors, error_kw=error_style)
        for row, value, end in zip(places + offset, accuracy, high, strict=True):
            ax.text(end + 1.2, row, _percent(value / 100), va="center", fontsize=6.5)
    ax.set_yticks([place for place, _, _ in ticks], [label for _, label, _ in ticks], fontsize=8)
    for label, (_, _, is_group) in zip(ax.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if is_group else "normal")
    ax.set(xlim=(0, 110), ylim=(ticks[-1][0] + 0.7, -0.6), xticks=range(0, 101, 20), axisbelow=True)
    ax.set_xlabel("accuracy in percent, with its 95% interval", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def accuracy_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Score]]], title: str = "", reference: tuple[str, float] | None = None
) -> Figure:
    """Draw how accuracy grows with something, with 95% intervals: a panel for each thing, a line for each name.

    Args:
        panels: by what is on the horizontal axis, such as "iterations": by name, scores by its value, on a logarithmic
            scale.
        title: above the figure.
        reference: a label and an accuracy, 0 to 1, to draw as a line.

    Raises:
        ValueError: if there are no panels, or one has a line without scores.
    """
    import seaborn as sns
    from matplotlib.ticker import NullFormatter, NullLocator

    if not panels or not all(lines and all(lines.values()) for lines in panels.values()):
        raise ValueError(f"panels must have lines with at least one score each, got {dict(panels)}")
    figure = _new_figure(2.5 * len(panels) + 1.0, 3.2, title)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    for ax, (axis, lines) in zip(grid, panels.items(), strict=True):
        for name, scores in lines.items():
            percent = 100 * np.array([(score.accuracy, *score.confidence_interval) for score in scores.values()])
            accuracy, low, high = percent.T
            errors = np.maximum(0, [accuracy - low, high - accuracy])
            style = {"color": colors[name], "linewidth": 1.3, "markersize": 3.5, "capsize": 2, "label": name}
            ax.errorbar(list(scores), accuracy, errors, marker="o", **style)
        if reference is not None:
            ax.axhline(100 * reference[1], color="0.35", linestyle=(0, (1, 1.5)), linewidth=1.2, label=reference[0])
        ticks = sorted({x for scores in lines.values() for x in scores})
        ax.set(xscale="log", xlabel=axis, ylim=(-3, 103))
        ax.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.92", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("accuracy in percent")
    labels = {label: handle for ax in grid for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def pca_figure(points: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw sets of vectors as points in the plane in which they vary most, their first two principal components.

    Args:
        points: by name, (N, C) each; of the same C.
        title: above the figure.

    Raises:
        ValueError: if there are no points, or their sizes differ.
    """
    import seaborn as sns

    sizes = {name: tuple(each.shape) for name, each in points.items()}
    if len({size[1:] for size in sizes.values()}) != 1 or any(len(size) != 2 for size in sizes.values()):
        raise ValueError(f"points must be sets of vectors (N, C) of one size C, got {sizes}")
    sets = {name: each.detach().double().cpu().numpy() for name, each in points.items()}
    everything = np.concatenate(list(sets.values()))
    center = everything.mean(axis=0)
    _, spread, axes = np.linalg.svd(everything - center, full_matrices=False)
    shares = spread[:2] ** 2 / (spread**2).sum()
    figure = _new_figure(5.6, 4.0, title)
    ax = figure.subplots()
    for color, (name, each) in zip(sns.color_palette("colorblind", len(sets)), sets.items(), strict=True):
        x, y = ((each - center) @ axes[:2].T).T
        ax.scatter(x, y, s=7, color=color, alpha=0.6, linewidths=0, label=name)
    ax.set_xlabel(f"first component, {_percent(shares[0])}% of the variance", fontsize=8)
    ax.set_ylabel(f"second component, {_percent(shares[1])}%", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_aspect("equal", adjustable="datalim")
    ax.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside right center", frameon=False, fontsize=8, markerscale=2)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


# ------------------------------------------------------------------------------------------------- training


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file such as the Trainer's ``metrics_path``; empty lines are skipped.

    Raises:
        ValueError: if a line is not a JSON object, with the file's name and the line's number.
    """
    lines = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); a killed run may leave half a line") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {line!r}")
        lines.append(value)
    return lines


def learning_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "", floor: float | None = None
) -> Figure:
    """Draw the loss, on a logarithmic scale, against the iteration.

    Args:
        curves: by name, the lines of a metrics file: each has "iter" and "loss" (nats a token).
        title: above the figure.
        floor: the loss of the best possible predictor, drawn as a line.

    Raises:
        ValueError: if there are no curves, a line lacks "iter" or "loss", or the floor is not positive.
    """
    import seaborn as sns
    from matplotlib.ticker import LogLocator

    bad = [name for name, lines in curves.items() if not lines or any(not {"iter", "loss"} <= set(x) for x in lines)]
    if bad or not curves:
        raise ValueError(f"curves must have lines with 'iter' and 'loss'; without them: {bad or 'there are no curves'}")
    if floor is not None and not floor > 0:
        raise ValueError(f"floor must be positive, to be drawn on a logarithmic scale, got {floor}; leave it out")
    figure = _new_figure(6.4, 3.8, title)
    ax = figure.subplots()
    colors = sns.color_palette("colorblind", 8)
    for number, (name, lines) in enumerate(curves.items()):
        style = ("-", "--", ":", "-.")[number // len(colors) % 4]
        iters, losses = [line["iter"] for line in lines], [line["loss"] for line in lines]
        ax.plot(iters, losses, style, color=colors[number % len(colors)], linewidth=1.3, label=name)
    if floor is not None:
        ax.axhline(floor, color="0.35", linestyle=(0, (1, 1.5)), linewidth=1.2, label=f"best possible, {floor:.3g}")
    ax.set(yscale="log", xlabel="iteration", ylabel="loss (nats a token)")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.grid(color="0.92", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def head_heatmap(values: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw numbers for every layer and head as heatmaps side by side, each on its own scale from 0.

    Args:
        values: (L, H) each, not negative, by what they are.
        title: above the figure.

    Raises:
        ValueError: if there are none, or their shapes differ.
    """
    shapes = {name: tuple(each.shape) for name, each in values.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"values must be of one shape (layers, heads), got {shapes}")
    n_layers, n_heads = next(iter(shapes.values()))
    panel = max(0.5 * n_heads, 2.4)
    figure = _new_figure(len(values) * (panel + 0.5), 0.32 * n_layers + 1.3, title)
    for ax, (name, each) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        shown = each.double().numpy()
        texts = np.array([[f"{value:.3g}" for value in row] for row in shown])
        _heatmap(ax, shown, max(shown.max(), 1e-12), texts, "Blues", 7.0, edgecolor="white", linewidth=0.5)
        ax.set_xticks(np.arange(n_heads) + 0.5, [str(head) for head in range(1, n_heads + 1)], fontsize=8)
        ax.set_yticks(np.arange(n_layers) + 0.5, [str(layer) for layer in range(1, n_layers + 1)], fontsize=8)
        ax.set_xlabel("head", fontsize=9)
        ax.set_ylabel("layer", fontsize=9)
        ax.set_title(name, fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------- shared parts


def _new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of this size in inches with nothing but a title.

    In IPython pyplot makes it, so that a notebook shows it wherever in a cell it is drawn. Elsewhere pyplot does not
    know about it: no window opens and nothing has to be closed.
    """
    from matplotlib.figure import Figure

    size: dict[str, Any] = {"figsize": (width, height), "layout": "constrained"}
    if hasattr(builtins, "__IPYTHON__"):
        import matplotlib.pyplot as plt

        figure = plt.figure(**size)
        if "inline" in plt.get_backend():
            setattr(figure, "_ipython_display_", partial(_take_from_pyplot, figure))  # noqa: B010 (IPython's hook)
    else:
        figure = Figure(**size)
    if title:
        figure.suptitle(title, fontsize=max(11, 0.8 * width))
    return figure


def _take_from_pyplot(figure: Figure) -> None:
    """Called when a notebook is about to show the figure: pyplot, which would show it again, must let go of it."""
    import matplotlib.pyplot as plt
    from IPython.display import display  # present, since IPython is the caller

    waiting = [plt.figure(number) for number in plt.get_fignums()]
    if figure in waiting:
        plt.close(figure)
        for earlier in waiting[: waiting.index(figure)]:  # shown first, in the order in which they were drawn
            plt.close(earlier)
            display(earlier)
    raise NotImplementedError  # how IPython is told to show it as it shows any figure


def _heatmap(
    ax: Axes, values: np.ndarray, highest: float, texts: np.ndarray, cmap: str, fontsize: float, **style: Any
) -> None:
    """Draw (rows, columns) of values from 0 to ``highest`` as cells, the first row on top, with texts in them."""
    # Not seaborn's heatmap, which draws the whole figure again for every panel.
    ax.pcolormesh(values, cmap=cmap, vmin=0, vmax=highest, rasterized=True, **style)
    ax.set_ylim(len(values), 0)
    ax.spines[:].set_visible(False)
    ax.tick_params(which="both", length=0)
    for row, column in np.argwhere(texts != ""):
        color = "white" if values[row, column] > 0.67 * highest else "black"
        place = (column + 0.5, row + 0.5)
        ax.text(*place, str(texts[row, column]), ha="center", va="center", fontsize=fontsize, color=color)


def _position_heatmap(shares: Mapping[str, Sequence[float]], requirement: str, title: str, label: str) -> Figure:
    """A heatmap of shares, 0 to 1, at each output position, one row for each name."""
    lengths = {name: len(values) for name, values in shares.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"{requirement} of one and the same length, got the lengths {lengths}")
    columns = [str(position) for position in range(1, max(lengths.values()) + 1)]
    figure, ax = _percent_heatmap(tuple(shares), columns, np.array(list(shares.values())), title, label)
    ax.set_xlabel("output position", fontsize=9)
    return figure


def _percent_heatmap(
    rows: Sequence[str], columns: Sequence[str], shares: np.ndarray, title: str, label: str = "accuracy in percent"
) -> tuple[Figure, Axes]:
    """A figure of shares, 0 to 1, as annotated percentages on a scale from 0 to 100."""
    width, height = 0.42 * len(columns) + 0.075 * max(map(len, rows)), 0.26 * len(rows) + 0.05 * max(map(len, columns))
    figure = _new_figure(max(width + 1.2, 5.0), height + 1.4, title)
    ax = figure.subplots()
    texts = np.array([[_percent(share) for share in row] for row in shares])
    _heatmap(ax, 100 * shares, 100, texts, "Blues", 7.0, edgecolor="white", linewidth=0.5)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    _add_colorbar(figure, np.array([[ax]]), label, shrink=1.0)
    return figure, ax


def _percent(share: float) -> str:
    """A share from 0 to 1 in percent; only an exact 0 or 1 has no decimal."""
    return f"{100 * share:.0f}" if share in (0, 1) else f"{100 * share:.1f}"


def _add_colorbar(figure: Figure, grid: np.ndarray, label: str, shrink: float) -> None:
    """Explain the colours of a grid of heatmaps, all on one scale, at its right."""
    pad = 0.15 / figure.get_figwidth()
    bar = figure.colorbar(grid[0, 0].collections[0], ax=grid, shrink=shrink, aspect=20, anchor=(0, 1), pad=pad)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(label, fontsize=8)
