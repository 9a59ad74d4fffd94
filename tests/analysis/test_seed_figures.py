"""Figures over seeds show each seed, and their mean."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from mingpt.analysis.seed_figures import seed_dots, seed_lines

FRAME = pd.DataFrame(
    [
        {"method": method, "task": task, "size": size, "seed": seed, "accuracy": (size + seed) / 10, "loss": 2.0 + seed}
        for method, task, size, seed in itertools.product(["b", "a"], ["one", "two", "three"], [2, 1], range(3))
    ]
)


def test_each_seed_is_a_dot_and_a_bar_is_their_mean():
    figure = seed_dots(FRAME[FRAME["size"] == 2], "method", "task", n_columns=2)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["one", "two", "three"]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["b", "a"]
    dots, bars = (np.asarray(each.get_offsets()) for each in shown[1].collections)
    assert sorted(map(tuple, dots.round(6).tolist())) == [(x, y) for x in (20, 30, 40) for y in (-1, 0)]
    assert bars.round(6).tolist() == [[30, -1], [30, 0]]
    losses = seed_dots(FRAME[FRAME["size"] == 2], "method", "task", value="loss")
    assert np.asarray(losses.axes[0].collections[0].get_offsets())[:, 0].max() == 4


def test_a_line_is_the_mean_over_seeds_at_each_number():
    figure = seed_lines(FRAME, "size", "method", "task", label="positions")
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2"]
    assert np.allclose(ax.lines[0].get_xydata(), [[0, 20], [1, 30]])
    assert [len(each.get_offsets()) for each in ax.collections] == [6, 6]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["b", "a"]
