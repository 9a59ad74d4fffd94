"""Figures show the numbers they are given, with nothing overlapping or cut off, and change nothing of the caller's."""

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from pandas import DataFrame

from mingpt.analysis.figures import (
    PREFIX_COLORS,
    accuracy_matrix_figure,
    attention_maps,
    attention_visualization,
    forbidden_mass_figure,
    head_heatmap,
    learning_curves,
    paired_bars,
    pca_figure,
    position_accuracy_figure,
)
from mingpt.analysis.theory import random_case
from mingpt.evaluation import ConstraintEffect, Score
from mingpt.tasks import PRETRAINING_TASKS, TEST_TASKS

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("error")

P, L = 3, 4
T = P + 2 * L - 1
TASKS = [str(task) for task in PRETRAINING_TASKS + TEST_TASKS]


def record_of(n_layers, n_heads, n_tokens=T):
    """Random causal attention, with the other entries that a model records."""
    scores = torch.randn(n_layers, 1, n_heads, n_tokens, n_tokens, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.ones(n_tokens, n_tokens).triu(1).bool(), float("-inf"))
    names = ("attention", "attn_block_output")
    return [(name, layer if name == names[0] else torch.zeros(1, 1)) for layer in scores.softmax(-1) for name in names]


def sample_of(prefix_size=P, length=L):
    return torch.tensor([0] * prefix_size + [1 + i % 10 for i in range(2 * length)])


def panels_of(figure):
    return [ax for ax in figure.axes if ax.get_title(loc="right")]


def cells_of(ax):
    """The heatmap's values, (rows, columns), masked where there is no cell."""
    return np.ma.asarray(ax.collections[0].get_array())


@pytest.mark.parametrize("n_positions", [None, P, P - 1])
def test_attention_maps_are_those_of_the_model(n_positions):
    """Without a prefix, with one, and with one that is shorter than its placeholders."""
    model, prefix, x = random_case(0, 2, 2, 4, n_positions or P, T, "key_value")
    x = x[:1, :T]
    prefix = n_positions and replace(prefix, n_placeholders=P)
    figure, content = attention_maps(model, x, L, prefix, "title", ignore_and_rescale_prefix=True)
    without = attention_maps(model, x, L)[1]
    assert [tuple(each.shape) for each in content] == [(2, 2 * L - 1, 2 * L - 1)] * 2
    assert torch.allclose(content[0], without[0], atol=1e-6)  # the first layer's, which a prefix cannot change
    assert torch.allclose(content[1], without[1], atol=1e-6) == (n_positions is None)
    drawn = cells_of(panels_of(figure)[0]).data
    assert np.allclose(drawn[np.tril_indices(2 * L - 1)], content[0][0].numpy()[np.tril_indices(2 * L - 1)], atol=1e-6)


def labels(axis, minor=False):
    return [label.get_text() for label in axis.get_ticklabels(minor=minor)]


def score(n_correct, n_rows=3200, by_position=()):
    return Score(n_correct, n_rows, tuple(by_position))


def matrix_of(prefixes, tasks, n_rows=3200):
    counts = np.random.default_rng(0).integers(0, n_rows + 1, (len(prefixes), len(tasks)))
    return DataFrame([[score(n, n_rows) for n in row] for row in counts], list(prefixes), list(tasks))


def assert_nothing_overlaps(texts):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 1
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert wide <= 0 or high <= 0, f"{one!r} overlaps {other!r} by {wide:.1f} x {high:.1f} pixels"


def assert_nothing_is_cut_off(figure):
    figure.draw_without_rendering()
    box = figure.get_tightbbox()  # inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, mingpt.analysis.figures; sys.exit('matplotlib' in sys.modules or 'seaborn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ attention


def test_every_head_of_every_layer_shows_its_attention():
    record = record_of(3, 2)
    figure = attention_visualization(sample_of(), record, P, L, title="a title")
    panels = panels_of(figure)
    assert [ax.get_title(loc="right") for ax in panels] == ["L1 H1", "L1 H2", "L2 H1", "L2 H2", "L3 H1", "L3 H2"]
    is_later = np.triu(np.ones((T, T), dtype=bool), 1)
    attention = [heads for name, layer in record if name == "attention" for heads in layer[0].numpy()]
    for ax, expected in zip(panels, attention, strict=True):
        shown = cells_of(ax)
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), is_later)
        np.testing.assert_array_equal(shown[~is_later], expected[~is_later])
        assert ax.yaxis_inverted()
    assert figure.get_suptitle() == "a title"


def test_ignoring_the_prefix_rescales_each_row_of_the_content_to_one():
    record = record_of(2, 2)
    figure = attention_visualization(sample_of(), record, P, L, ignore_and_rescale_prefix=True)
    shown = cells_of(panels_of(figure)[3])
    assert shown.shape == (T - P, T - P)
    np.testing.assert_allclose(shown.filled(0).sum(axis=1), 1, rtol=1e-6)
    content = record[2][1][0, 1, P:, P:].numpy()
    np.testing.assert_allclose(shown.filled(0), content / content.sum(axis=1, keepdims=True), rtol=1e-6)


def test_a_row_that_attends_to_the_prefix_only_has_nothing_to_rescale():
    attention = torch.zeros(1, 1, T, T)
    attention[..., 0] = 1
    figure = attention_visualization(sample_of(), [("attention", attention)], P, L, ignore_and_rescale_prefix=True)
    assert (cells_of(panels_of(figure)[0]).compressed() == 0).all()


@pytest.mark.parametrize("ignore", [False, True])
def test_the_callers_record_is_unchanged(ignore):
    record, sample = record_of(2, 2), sample_of()
    before = [tensor.clone() for _, tensor in record]
    attention_visualization(sample, record, P, L, ignore_and_rescale_prefix=ignore)
    assert len(record) == len(before)
    assert all(torch.equal(tensor, old) for (_, tensor), old in zip(record, before, strict=True))
    assert torch.equal(sample, sample_of())


@pytest.mark.parametrize(("ignore", "groups"), [(False, ["prefix", "input", "output"]), (True, ["input", "output"])])
def test_axes_name_the_tokens_that_were_read_and_their_groups(ignore, groups):
    sample = torch.tensor([0, 0, 0, 7, 5, 3, 10, 11, 12, 4, 9])
    record = record_of(2, 2)
    figure = attention_visualization(sample[None], record, P, L, ignore_and_rescale_prefix=ignore)
    top_left, top_right, bottom_left, bottom_right = panels_of(figure)
    n_hidden = P if ignore else 0
    for axis in (top_left.yaxis, bottom_left.yaxis, bottom_left.xaxis, bottom_right.xaxis):
        assert labels(axis) == ["7", "5", "3", "10", "11", "12", "4"]
        assert list(axis.get_ticklocs()) == [token + 0.5 - n_hidden for token in range(P, T)]
        assert labels(axis, minor=True) == groups
    for axis in (top_left.xaxis, top_right.xaxis, top_right.yaxis, bottom_right.yaxis):
        assert labels(axis) == []
    edges = {tuple(np.asarray(line.get_xdata())) for line in top_left.lines}
    assert edges == ({(0, L, L)} if ignore else {(0, P, P), (0, P + L, P + L)})


def test_values_are_printed_on_request_and_where_there_is_room():
    weights = torch.zeros(1, 1, T, T)
    weights[..., 0] = 0.875
    weights[..., 1] = 0.125
    weights[..., 2] = 0.001
    record = [("attention", weights)]
    printed = [text.get_text() for text in panels_of(attention_visualization(sample_of(), record, P, L))[0].texts]
    assert sorted(set(printed)) == [".12", ".88"]
    assert len(printed) == T + T - 1
    assert not panels_of(attention_visualization(sample_of(), record, P, L, annot=False))[0].texts
    many = attention_visualization(sample_of(), record_of(3, 3), P, L)
    assert not any(ax.texts for ax in panels_of(many))


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "prefix_size", "length", "token"),
    [(12, 8, 10, 10, 10), (1, 1, 0, 1, 5), (3, 3, 10, 10, 5), (3, 3, 5, 12, 1000), (2, 2, 1, 40, 10)],
)
def test_attention_labels_do_not_overlap(n_layers, n_heads, prefix_size, length, token):
    record = record_of(n_layers, n_heads, prefix_size + 2 * length - 1)
    sample = torch.full((prefix_size + 2 * length,), token)
    figure = attention_visualization(sample, record, prefix_size, length, "title")
    assert_nothing_is_cut_off(figure)
    texts = [text for ax in panels_of(figure) for text in ax.findobj(Text) if text.get_text() and text.get_visible()]
    assert_nothing_overlaps(texts)
    assert min(text.get_fontsize() for text in texts) >= 6


@pytest.mark.parametrize(
    ("sample", "record", "sizes", "message"),
    [
        (sample_of(), [], (P, L), r"one row's 'attention' .* \[\]"),
        (sample_of(), [("logits", torch.zeros(1))], (P, L), r"one row's 'attention' .* \[\]"),
        (
            sample_of(),
            [("attention", torch.zeros(2, 1, T, T))],
            (P, L),
            r"one row's 'attention' .* \[\(2, 1, 10, 10\)\]",
        ),
        (
            sample_of(),
            [("attention", torch.zeros(1, 1, T, T + 1))],
            (P, L),
            r"\(1, heads, 10, 10\).* \[\(1, 1, 10, 11\)\]",
        ),
        (sample_of(), [("attention", torch.zeros(1, T, T))], (P, L), r"\[\(1, 10, 10\)\]"),
        (sample_of(), [("attention", torch.zeros(1, h, T, T)) for h in (2, 3)], (P, L), "the same heads in all"),
        (sample_of()[:-1], record_of(1, 1), (P, L), rf"prefix_size = 3 and length = 4 .* got \({T},\)"),
        (torch.stack([sample_of()] * 2), record_of(1, 1), (P, L), "one row"),
        (sample_of(), record_of(1, 1), (-1, L), "prefix_size = -1"),
        (sample_of(), record_of(1, 1), (P, 0), "length = 0"),
    ],
)
def test_attention_that_does_not_fit_is_refused(sample, record, sizes, message):
    with pytest.raises(ValueError, match=message):
        attention_visualization(sample, record, *sizes)


# ----------------------------------------------------------------------------------------------- accuracies


def test_matrix_cells_and_annotations_are_the_accuracies():
    prefixes, tasks = ("none", "Add1", "Modulo", "other"), ("Modulo", "LessThan", "Add1")
    counts = [[0, 3200, 1], [1600, 3199, 2400], [17, 400, 3197], [5, 6, 7]]
    matrix = DataFrame([list(map(score, row)) for row in counts], prefixes, tasks)
    figure = accuracy_matrix_figure(matrix, title="a title")
    ax = figure.axes[0]
    np.testing.assert_allclose(cells_of(ax), np.array(counts) / 32)
    shares = accuracy_matrix_figure(matrix.map(lambda score: score.accuracy))
    np.testing.assert_allclose(cells_of(shares.axes[0]), np.array(counts) / 32)
    assert ax.collections[0].get_clim() == (0, 100)
    printed = {text.get_position(): text.get_text() for text in ax.texts}
    expected = [["0.0", "100.0", "0.0"], ["50.0", "100.0", "75.0"], ["0.5", "12.5", "99.9"], ["0.2", "0.2", "0.2"]]
    assert printed == {(c + 0.5, r + 0.5): expected[r][c] for r in range(4) for c in range(3)}
    assert (labels(ax.yaxis), labels(ax.xaxis)) == (list(prefixes), list(tasks))
    outlined = {patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle)}
    assert outlined == {(2, 1), (0, 2)}
    assert figure.get_suptitle() == "a title"


def test_matrix_labels_do_not_overlap():
    figure = accuracy_matrix_figure(matrix_of(["none", *TASKS], TASKS), title="title")
    assert_nothing_is_cut_off(figure)
    ax = figure.axes[0]
    assert_nothing_overlaps([*ax.texts, *ax.get_yticklabels()])
    spacing = ax.bbox.width / len(TASKS)
    for label in ax.get_xticklabels():  # slanted: what counts is the distance across the text
        across = spacing * np.sin(np.radians(label.get_rotation()))
        label.set_rotation(0)
        assert label.get_window_extent().height <= across


def test_small_matrix_is_not_cut_off():
    figure = accuracy_matrix_figure(matrix_of(["none"], ["Add1"], n_rows=32))
    assert_nothing_is_cut_off(figure)


def test_matrix_without_scores_is_refused():
    for matrix in (DataFrame(), DataFrame(columns=["Add1"]), DataFrame(index=["none"])):
        with pytest.raises(ValueError, match="at least one row and one column"):
            accuracy_matrix_figure(matrix)


def test_position_accuracies_are_shown_by_row():
    scores = {"Add1": score(1, by_position=(1.0, 0.5, 0.25)), "Modulo": score(2, by_position=(0.0, 0.125, 1.0))}
    figure = position_accuracy_figure(scores, title="a title")
    ax = figure.axes[0]
    np.testing.assert_allclose(cells_of(ax), [[100, 50, 25], [0, 12.5, 100]])
    assert (labels(ax.yaxis), labels(ax.xaxis)) == (["Add1", "Modulo"], ["1", "2", "3"])
    assert_nothing_is_cut_off(figure)


def test_forbidden_masses_are_on_a_scale_of_their_own():
    masses = {"sort": (0.0, 0.02, 0.05), "add": (0.01, 0.0, 0.0)}
    figure = forbidden_mass_figure({name: ConstraintEffect(score(1), score(2), each) for name, each in masses.items()})
    ax = figure.axes[0]
    np.testing.assert_allclose(cells_of(ax), 100 * np.array(list(masses.values())))
    assert ax.collections[0].get_clim() == (0, 5)
    assert [text.get_text() for text in ax.texts] == ["0.0", "2.0", "5.0", "1.0", "0.0", "0.0"]
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("lengths", [(), (0,), (2, 3)])
def test_positions_that_differ_in_number_are_refused(lengths):
    with pytest.raises(ValueError, match=r"at least one row and one column|same length"):
        position_accuracy_figure({str(n): score(1, by_position=[0.5] * n) for n in lengths})


GROUPS = {"pretrained": TASKS[:7], "new task": TASKS[7:11], "composition": TASKS[11:]}


def test_bars_are_the_accuracies_with_their_intervals():
    with_prefix = {task: score(3200 - 190 * i) for i, task in enumerate(TASKS)}
    without = {task: score(100 * i, 1600) for i, task in enumerate(TASKS)}
    figure = paired_bars(with_prefix, without, GROUPS)
    (ax,) = figure.axes
    with_bars, without_bars = (bars for bars in ax.containers if isinstance(bars, BarContainer))
    for bars, scores in ((with_bars, with_prefix), (without_bars, without)):
        np.testing.assert_allclose([bar.get_width() for bar in bars], [100 * scores[t].accuracy for t in TASKS])
        assert bars.errorbar is not None
        (segments,) = bars.errorbar[2]
        ends = [segment[:, 0] for segment in segments.get_segments()]
        np.testing.assert_allclose(ends, [100 * np.array(scores[t].confidence_interval) for t in TASKS], atol=1e-9)
    ticks = dict(zip(labels(ax.yaxis), ax.get_yticks(), strict=True))
    assert list(ticks) == [name for group, tasks in GROUPS.items() for name in (group, *tasks)]
    for bar, task in zip(with_bars, TASKS, strict=True):
        assert bar.get_y() < ticks[task] < ticks[task] + 0.5
    bold = {label.get_text() for label in ax.get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == set(GROUPS)
    assert [text.get_text() for text in ax.texts][:2] == ["100.0", "94.1"]
    assert [to_rgb(bars[0].get_facecolor()) for bars in (with_bars, without_bars)] == [*map(to_rgb, PREFIX_COLORS)]


@pytest.mark.parametrize("n_rows", [3200, 20])
def test_bar_labels_do_not_overlap(n_rows):
    with_prefix = {task: score(n_rows - i % 3, n_rows) for i, task in enumerate(TASKS)}
    figure = paired_bars(with_prefix, {task: score(i, n_rows) for i, task in enumerate(TASKS)}, GROUPS, "title")
    assert_nothing_is_cut_off(figure)
    (ax,) = figure.axes
    assert_nothing_overlaps([*ax.texts, *ax.get_yticklabels()])
    assert max(text.get_window_extent().x1 for text in ax.texts) < ax.bbox.x1


# ------------------------------------------------------------------------------------------------- training


def test_heads_have_their_numbers_in_one_format():
    values = {"counts": torch.tensor([[1, 2, 3], [4, 5, 6]]), "shares": torch.tensor([[0.53, 0.461, 0], [1, 0.1, 0.2]])}
    figure = head_heatmap(values, "title")
    assert [ax.get_title() for ax in figure.axes] == list(values)
    for ax, each in zip(figure.axes, values.values(), strict=True):
        np.testing.assert_allclose(cells_of(ax), each)
        assert (labels(ax.yaxis), labels(ax.xaxis)) == (["1", "2"], ["1", "2", "3"])
    printed = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert printed == [list("123456"), ["0.53", "0.46", "0.00", "1.00", "0.10", "0.20"]]
    assert_nothing_is_cut_off(figure)


def test_points_keep_their_distances_where_a_plane_holds_them():
    """In ten dimensions, but all in one plane: what is drawn is congruent to what is given."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(10, 2, generator=generator)).Q.T
    sets = {name: 3 + torch.randn(n, 2, generator=generator) @ plane for name, n in (("a", 7), ("b", 5))}
    figure = pca_figure(sets, "title")
    drawn = np.concatenate([each.get_offsets() for each in figure.axes[0].collections])
    given = torch.cat(list(sets.values())).numpy()
    for one, other in itertools.combinations(range(12), 2):
        distance = np.linalg.norm(given[one] - given[other])
        assert np.linalg.norm(drawn[one] - drawn[other]) == pytest.approx(distance, rel=1e-4)
    shares = [
        float(label.split()[2].rstrip("%")) for label in (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())
    ]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    assert_nothing_is_cut_off(figure)


def test_curves_are_the_losses_over_a_floor():
    curves = {f"run {k}": [{"iter": 10 * i, "loss": (k + 1) / i} for i in (1, 2, 4)] for k in range(20)}
    figure = learning_curves(curves, title="a title", floor=0.125)
    (ax,) = figure.axes
    *lines, floor = (line for line in ax.lines if len(line.get_xdata()))  # seaborn's legend has empty ones
    for line, points in zip(lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), [[point["iter"], point["loss"]] for point in points])
    np.testing.assert_array_equal(floor.get_ydata(), 0.125)
    assert ax.get_yscale() == "log"
    assert len({(to_rgb(line.get_color()), str(line._unscaled_dash_pattern)) for line in lines}) == 20
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*curves, "best possible, 0.125"]


def test_curves_are_not_cut_off():
    points = [{"iter": i, "loss": 3 / i} for i in range(1, 50)]
    figure = learning_curves(dict.fromkeys(TASKS, points), title="title")
    assert_nothing_is_cut_off(figure)
    assert_nothing_overlaps(figure.axes[0].get_legend().get_texts())


# ------------------------------------------------------------------------------------- where figures are shown


def test_pyplot_keeps_nothing_and_the_style_stays():
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    for _ in range(25):  # pyplot warns from the 21st on
        attention_visualization(torch.tensor([1, 2]), record_of(1, 1, 1), 0, 1)
    learning_curves({"a": [{"iter": 1, "loss": 1.0}]})
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("setup", ["", "%matplotlib inline", "import matplotlib.pyplot as plt; plt.figure()"])
def test_a_notebook_shows_a_figure_exactly_once(monkeypatch, setup):
    """As a cell's last value or by ``display``, whether or not the inline backend is there."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses its own
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    draw = 'learning_curves({"a": [{"iter": 1, "loss": 1.0}]})'
    cells = [
        f"from mingpt.analysis.figures import learning_curves\n{setup}",
        draw,
        f"figure = {draw}",
        "figure",
        f"for _ in range(2):\n    display({draw})",
        f"display({draw})\n{draw}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own
        nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    n_images = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in notebook.cells[1:]]
    assert n_images == [1, 0, 1, 2, 2]
