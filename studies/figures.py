"""Draw the figures of docs/studies and print their tables: ``python studies/figures.py [methods length ...]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from mingpt.analysis.seed_figures import seed_dots, seed_lines

STUDIES, DOCS = Path("studies"), Path("docs/studies")


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(STUDIES / f"{name}.csv")


def markdown(table: pd.DataFrame) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def chosen(results: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Of each method and size and whatever else is named, the rate with the best mean; the smaller loss where equal."""
    means = results.groupby([*keys, "learning_rate"])[["accuracy", "loss"]].mean().reset_index()
    best = means.sort_values(["accuracy", "loss"], ascending=[False, True]).drop_duplicates(list(keys))
    return results.merge(best[[*keys, "learning_rate"]])


def spread(results: pd.DataFrame, rows: str | list[str], columns: str) -> str:
    """Mean and standard deviation over seeds in percent, as Markdown."""
    grouped = 100 * results.pivot_table("accuracy", rows, columns, aggfunc=["mean", "std"], sort=False)
    text = grouped["mean"].map("{:.1f}".format) + " ± " + grouped["std"].map("{:.1f}".format)
    return markdown(text.reset_index())


def methods() -> None:
    results = read("methods/results").merge(read("methods/seconds"))
    order = results.groupby("method")["accuracy"].mean().sort_values(ascending=False).index
    results = results.set_index("method").loc[order].reset_index()
    title = "Nine tasks, at most 1,000 iterations of 16 rows"
    seed_dots(results, "method", "task", title).savefig(DOCS / "methods.png", dpi=150)
    print(spread(results, "method", "task"))
    costs = results.groupby("method", sort=False)[["learning_rate", "n_parameters", "n_iters", "seconds"]].mean()
    print(markdown(costs.map("{:.4g}".format).reset_index()))
    hard = results[results["task"].isin(["FilterAtLeastNTimes", "SortAscending+Add1", "LessThan+SortAscending"])]
    curves = pd.DataFrame(hard["curve"].map(json.loads).tolist(), index=hard["method"])  # on validation rows
    print(
        markdown((100 * curves.ffill(axis=1)[[1, 3, 6, 9]].groupby("method", sort=False).mean()).round(1).reset_index())
    )


def methods_longer() -> None:
    results = pd.concat([read("methods/results"), read("methods_longer/results")])
    results = results[results["task"].isin(read("methods_longer/results")["task"])]
    longest = results[results["max_iters"] == results["max_iters"].max()]
    order = longest.groupby("method")["accuracy"].mean().sort_values(ascending=False).index
    longest = longest.set_index("method").loc[order].reset_index()
    title = "The four hard tasks, at most 2,500 iterations of 16 rows"
    seed_dots(longest, "method", "task", title).savefig(DOCS / "methods_longer.png", dpi=150)
    print(spread(longest, "method", "task"))
    ends = longest.assign(is_at_plateau=longest["n_iters"] < longest["max_iters"])
    print(markdown(ends.pivot_table("is_at_plateau", "method", "task", aggfunc="sum", sort=False).reset_index()))
    seconds = longest.merge(read("methods_longer/seconds")).groupby("method", sort=False)[["n_iters", "seconds"]].mean()
    print(markdown(seconds.round(1).reset_index()))


def one_layer() -> None:
    results = chosen(read("one_layer/results"), "method", "size", "task")
    results["method and size"] = results["method"] + " " + results["size"].astype(str)
    title = "What a model of one layer, which sorts in ascending order, learns"
    for value, name in (("accuracy", "one_layer"), ("loss", "one_layer_loss")):
        figure = seed_dots(results, "method and size", "task", title, value, n_columns=3)
        figure.savefig(DOCS / f"{name}.png", dpi=150)
    print(spread(results, ["method", "size", "n_parameters"], "task"))


def one_layer_iterations() -> None:
    results = read("one_layer_iterations/results")
    figure = seed_lines(results, "max_iters", "method", "task", label="iterations")
    figure.savefig(DOCS / "one_layer_iterations.png", dpi=150)
    print(spread(results, ["method", "size", "n_parameters"], "max_iters"))


def double_histogram() -> None:
    results = read("double_histogram/results")
    order = results.groupby("method")["loss"].mean().sort_values().index
    results = results.set_index("method").loc[order].reset_index()
    for value, name in (("accuracy", "double_histogram"), ("loss", "double_histogram_loss")):
        figure = seed_dots(results, "method", "task", "10,000 iterations", value)
        figure.savefig(DOCS / f"{name}.png", dpi=150)
    print(spread(results, ["method", "n_parameters", "learning_rate"], "task"))
    print(results.groupby("method", sort=False)["loss"].agg(["mean", "std"]).round(3))


def length() -> None:
    results = read("length/results").assign(kept="trained at this length")
    cut = read("edits/biases").rename(columns={"number": "size"})
    names = {"positions": "shortened from ten", "directions": "ten, biases in so many directions"}
    both = pd.concat([results, cut[cut["size"] > 0].assign(kept=cut["kept"].map(names))])
    title = "How long must a prefix be? Key_value, at most 1,500 iterations of 16 rows"
    seed_lines(both, "size", "kept", "task", title, label="positions").savefig(DOCS / "length.png", dpi=150)
    print(spread(results, "size", "task"))
    print(spread(cut, ["kept", "size"], "task"))


def controls() -> None:
    results = read("controls/results")
    names = {"runs/untrained": "untrained", "runs/without_sorts": "five tasks, no sort"}
    results["pretraining"] = results["run"].map(names)
    title = "The same prefixes for other models"
    seed_dots(results, "pretraining", "task", title, n_columns=4).savefig(DOCS / "controls.png", dpi=150)
    print(spread(results, "pretraining", "task"))
    print(markdown((100 * read("edits/constants").set_index("task")).round(2).reset_index()))


def keys() -> None:
    results = read("edits/keys")
    results = results[(results["layers"] == "all") | (results["keys"] != "own")]
    results["keys"] = results["keys"] + results["layers"].map(lambda own: "" if own == "all" else f", layer {own}")
    figure = seed_dots(results, "keys", "task", "The same values with other keys")
    figure.savefig(DOCS / "keys.png", dpi=150)
    print(spread(results, "keys", "task"))


def inits() -> None:
    results = read("edits/inits")
    seed_dots(results, "init", "task", "400 iterations from each").savefig(DOCS / "inits.png", dpi=150)
    print(spread(results, "init", "task"))
    answers = 100 * read("edits/answers").pivot_table("accuracy", "task", "prefix", sort=False)
    print(markdown(answers.round(1).reset_index()))


def main() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    known = {
        each.__name__: each
        for each in (
            methods,
            methods_longer,
            one_layer,
            one_layer_iterations,
            double_histogram,
            length,
            controls,
            keys,
            inits,
        )
    }
    for name in sys.argv[1:] or known:
        print(f"\n## {name}\n")
        known[name]()


if __name__ == "__main__":
    main()
