"""Draw the figures of README.md and the studies from the files of results.

    python studies/figures.py [methods length ...]    # draws all, or those named
    python studies/figures.py --check                 # fails where one is of other results than there are now

A figure's file says what it was drawn from, and the hash of that.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from mingpt.analysis.seed_figures import seed_dots, seed_lines
from mingpt.experiments.reproduction import result_figures

ROOT = Path(__file__).parents[1]
STUDIES, DOCS = ROOT / "studies", ROOT / "docs"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(STUDIES / f"{name}.csv")


def hash_of(sources: list[str]) -> str:
    """Of the content of these files of the repository."""
    return hashlib.sha256(b"".join((ROOT / each).read_bytes() for each in sources)).hexdigest()


def by_mean(results: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """The methods with the largest mean first, or of a loss the smallest."""
    order = results.groupby("method")[value].mean().sort_values(ascending=value == "loss").index
    return results.set_index("method").loc[order].reset_index()


def laptop() -> dict[str, Figure]:
    results = json.loads((ROOT / "checkpoints/laptop/results.json").read_text())["value"]
    found = result_figures(results)
    return {name: found[name] for name in ("prefix_effect", "curves")}


def methods() -> dict[str, Figure]:
    title = "Nine tasks, at most 1,000 iterations of 16 rows"
    return {"studies/methods": seed_dots(by_mean(read("methods/results")), "method", "task", title)}


def methods_longer() -> dict[str, Figure]:
    title = "The four hard tasks, at most 2,500 iterations of 16 rows"
    return {"studies/methods_longer": seed_dots(by_mean(read("methods_longer/results")), "method", "task", title)}


def methods_iterations() -> dict[str, Figure]:
    longest = read("methods_10000/results")
    results = pd.concat([read("methods/results"), read("methods_longer/results"), longest])
    results = results[results["task"].isin(longest["task"]) & results["method"].isin(longest["method"])]
    figure = seed_lines(results, "max_iters", "method", "task", label="iterations, at most")
    return {"studies/methods_iterations": figure}


def one_layer() -> dict[str, Figure]:
    results = read("one_layer_test/results")
    results["method and size"] = results["method"] + " " + results["size"].astype(str)
    title = "What a model of one layer, which sorts in ascending order, learns"
    return {
        f"studies/{name}": seed_dots(results, "method and size", "task", title, value, n_columns=3)
        for value, name in (("accuracy", "one_layer"), ("loss", "one_layer_loss"))
    }


def one_layer_iterations() -> dict[str, Figure]:
    results = read("one_layer_iterations/results")
    return {"studies/one_layer_iterations": seed_lines(results, "max_iters", "method", "task", label="iterations")}


def double_histogram() -> dict[str, Figure]:
    results = by_mean(read("double_histogram/results"), "loss")
    return {
        f"studies/{name}": seed_dots(results, "method", "task", "10,000 iterations", value)
        for value, name in (("accuracy", "double_histogram"), ("loss", "double_histogram_loss"))
    }


def double_histogram_longer() -> dict[str, Figure]:
    results = pd.concat([read("double_histogram_longer/results"), read("double_histogram_slower/results")])
    rows = [
        {"method": f"{cell['method']} of size {cell['size']}, rate {cell['learning_rate']}", "task": cell["task"]}
        | {"iterations": 500 * n, "accuracy": accuracy}
        for cell in results.to_dict("records")
        for n, accuracy in enumerate(json.loads(cell["curve"]), start=1)
        if n % 10 == 0
    ]
    title = "Validation accuracy over 50,000 iterations, one seed"
    figure = seed_lines(pd.DataFrame(rows), "iterations", "method", "task", title)
    return {"studies/double_histogram_longer": figure}


def length() -> dict[str, Figure]:
    results = read("length/results").assign(kept="trained at this length")
    cut = read("edits/biases").rename(columns={"number": "size"})
    names = {"positions": "shortened from ten", "directions": "ten, biases in so many directions"}
    both = pd.concat([results, cut[cut["size"] > 0].assign(kept=cut["kept"].map(names))])
    title = "How long must a prefix be? Key_value, at most 1,500 iterations of 16 rows"
    return {"studies/length": seed_lines(both, "size", "kept", "task", title, label="positions")}


def controls() -> dict[str, Figure]:
    results = read("controls/results")
    names = {"runs/untrained": "untrained", "runs/without_sorts": "five tasks, no sort"}
    results["pretraining"] = results["run"].map(names)
    title = "The same prefixes for other models"
    return {"studies/controls": seed_dots(results, "pretraining", "task", title, n_columns=4)}


def keys() -> dict[str, Figure]:
    results = read("edits/keys")
    results = results[(results["layers"] == "all") | (results["keys"] != "own")]
    results["keys"] = results["keys"] + results["layers"].map(lambda own: "" if own == "all" else f", layer {own}")
    return {"studies/keys": seed_dots(results, "keys", "task", "The same values with other keys")}


def inits() -> dict[str, Figure]:
    return {"studies/inits": seed_dots(read("edits/inits"), "init", "task", "400 iterations from each")}


def cache_size() -> dict[str, Figure]:
    trained, shown = read("cache_size/results"), read("cache_size/in_context")
    shown = shown[shown["task"].isin(trained["task"]) & (shown["n_demonstrations"] > 0)]
    shown = shown.assign(method="demonstrations", size=shown["cache_size"].round().astype(int))
    both = pd.concat([trained[trained["method"] != "lora-attention"], shown])
    title = "How small can the cache be? A language model, at most 150 iterations of 8 texts"
    figure = seed_lines(both, "size", "method", "task", title, label="positions")
    figure.axes[0].set_ylim(84, 101)  # shared
    return {"studies/cache_size": figure}


def text_tasks() -> dict[str, Figure]:
    title = "Text tasks that the language model was not pretrained on, at most 150 iterations of 8 texts"
    return {"studies/text_tasks": seed_dots(read("text_tasks/results"), "method", "task", title)}


SOURCES = {
    laptop: ["checkpoints/laptop/results.json"],
    methods: ["studies/methods/results.csv"],
    methods_longer: ["studies/methods_longer/results.csv"],
    methods_iterations: [f"studies/{name}/results.csv" for name in ("methods", "methods_longer", "methods_10000")],
    one_layer: ["studies/one_layer_test/results.csv"],
    one_layer_iterations: ["studies/one_layer_iterations/results.csv"],
    double_histogram: ["studies/double_histogram/results.csv"],
    double_histogram_longer: [f"studies/double_histogram_{name}/results.csv" for name in ("longer", "slower")],
    length: ["studies/length/results.csv", "studies/edits/biases.csv"],
    controls: ["studies/controls/results.csv"],
    keys: ["studies/edits/keys.csv"],
    inits: ["studies/edits/inits.csv"],
    cache_size: ["studies/cache_size/results.csv", "studies/cache_size/in_context.csv"],
    text_tasks: ["studies/text_tasks/results.csv"],
}
"""The files of results that each function draws."""


def main() -> None:
    """Draw, or with --check look at what is there."""
    if "--check" in sys.argv:
        hashes = {hash_of(sources) for sources in SOURCES.values()}
        drawn = {path: Image.open(path).info.get("Hash") for path in [*DOCS.glob("*.png"), *DOCS.glob("studies/*.png")]}
        stale = [str(path.relative_to(ROOT)) for path, own in drawn.items() if own and own not in hashes]
        sys.exit(f"of other results than there are now: {', '.join(stale)}" if stale else 0)
    for draw, sources in SOURCES.items():
        if sys.argv[1:] and draw.__name__ not in sys.argv[1:]:
            continue
        for name, figure in draw().items():
            metadata = {"Source": ", ".join(sources), "Hash": hash_of(sources)}
            figure.savefig(DOCS / f"{name}.png", dpi=150, metadata=metadata)
            print(f"docs/{name}.png")


if __name__ == "__main__":
    main()
