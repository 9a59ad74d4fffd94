"""Write the numbers of README.md and the manual from the files of results.

    python docs/update_numbers.py            # as the files of results have them now
    python docs/update_numbers.py --check    # changes nothing, and fails where a page says something else

In a page a result stands between two comments, which neither GitHub nor Sphinx shows. The first one says in Python
where it comes from, with the functions below:

    An activation prefix solves <!--= mean("laptop", 0, task="Modulo", kind="activation") -->100<!--=-->% of the rows.

Around a table they stand on lines of their own. No other line may begin with one, as Markdown would not read the rest
of that line. A page with such comments may have no other number with decimals or a percent sign, so that one typed by
hand is found. What is no result, such as a setting, is written as `code`, and a published figure with the function of
that name.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mingpt.adapters import METHODS, size_for
from mingpt.experiments.reproduction import KINDS, MIXED, results_table
from mingpt.storage.cache import read_cached_json
from mingpt.storage.weights import load_model
from mingpt.tasks import PRETRAINING_TASKS

ROOT = Path(__file__).parents[1]
LAPTOP = ROOT / "checkpoints" / "laptop"
MARKED = re.compile(r"<!--= (?P<source>.+?) -->(?P<text>.*?)<!--=-->", re.DOTALL)
NO_CLAIM = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv[ :][\d.]+|Python [\d.]+", re.DOTALL)
TYPED = re.compile(r"[^\s|(]*(?:\d\.\d|\d%)[^\s|)]*")
SEVEN = [str(task) for task in PRETRAINING_TASKS]
COMPOSED = ["SortAscending+Add1", "Add1+LessThan", "LessThan+Add1", "Divisible+Add1"]
PREFIXES = ["prompt", "activation", "key_value", "key_value-mlp", "value", "cartridge", "gated"]
HARD = ["FilterAtLeastNTimes", "LessThan+SortAscending", "SortAscending+Add1", "MoreThanEqual", "DoubleHistogram"]

Selection = Any
"""What a column must be equal to, or a list of what it may be."""
By = str | list[str] | None


# ------------------------------------------------------------------------------------------------ the files of results


@functools.cache
def read(name: str) -> pd.DataFrame:
    """One result a row, of which "accuracy" is a fraction.

    Args:
        name: "laptop" for the run in checkpoints/laptop; "five_seeds" for docs/five_seeds.csv; or a file of studies/
            without its ending, where "methods" stands for "methods/results", with its seconds. Of a study "/curves" is
            one row for each time a training was validated, with that "accuracy", and after its end with the last. The
            "accuracy" of "edits/constants" is that of whole rows. "+" puts files behind one another.
    """
    if "+" in name:
        return pd.concat(map(read, name.split("+")), ignore_index=True)
    study, _, what = name.partition("/")
    if what == "curves":
        cells = read(study)
        step = tomllib.loads((ROOT / "studies" / f"{study}.toml").read_text())["prefix"]["validate_every"]
        points = pd.DataFrame([dict(enumerate(json.loads(each), start=1)) for each in cells["curve"]]).ffill(axis=1)
        points.columns *= step
        return cells.drop(columns="accuracy").join(
            points.melt(var_name="iteration", value_name="accuracy", ignore_index=False)
        )
    if name == "laptop":
        rows = [
            {"task": task, "kind": kind, "n_iters": results()["n_iters"].get(kind, {}).get(task), **row[kind]}
            for task, row in results()["tasks"].items()
            for kind in ("without", *KINDS, "chain")
            if row[kind]
        ]
        return pd.DataFrame([*rows, {"task": MIXED, "kind": "without", **results()["mixed"]}])
    if name == "five_seeds":
        found = pd.read_csv(ROOT / "docs" / "five_seeds.csv")
        return found.assign(accuracy=found["n_correct"] / found["n_rows"])
    found = pd.read_csv(ROOT / "studies" / f"{name if '/' in name else f'{name}/results'}.csv")
    if name == "edits/constants":
        return found.assign(accuracy=found["rows"])
    if "cell" in found and (ROOT / "studies" / name / "seconds.csv").exists():
        found = found.merge(pd.read_csv(ROOT / "studies" / name / "seconds.csv"))
    return found


@functools.cache
def results() -> dict[str, Any]:
    """What ``mingpt reproduce`` left in checkpoints/laptop; a file that was changed by hand is refused."""
    return read_cached_json(LAPTOP / "results.json")["value"]


def select(name: str, **where: Selection) -> pd.DataFrame:
    """Those rows of ``read(name)`` whose columns are as said."""
    rows = read(name)
    for column, value in where.items():
        rows = rows[rows[column].isin(value if isinstance(value, list) else [value])]
    if rows.empty:
        raise ValueError(f"{name} has no row with {where}")
    return rows


# ---------------------------------------------------------------------------------------------------- numbers in a text


def spread(name: str, digits: int = 1, column: str = "accuracy", **where: Selection) -> str:
    """Mean and standard deviation over seeds, of an accuracy in percent."""
    rows = select(name, **where)
    if rows["seed"].duplicated().any():
        raise ValueError(f"more than one result a seed of {name} with {where}")
    return f"{_number(rows[column].mean(), digits, column)} ± {_number(rows[column].std(), digits, column)}"


def mean(name: str, digits: int = 1, column: str = "accuracy", **where: Selection) -> str:
    """The mean of the selected rows, of an accuracy in percent."""
    return _number(select(name, **where)[column].mean(), digits, column)


def least(name: str, digits: int = 1, column: str = "accuracy", by: By = None, **where: Selection) -> str:
    """The smallest of the selected rows, or of their means ``by`` a column or several, of an accuracy in percent."""
    return _number(_values(name, column, by, where).min(), digits, column)


def most(name: str, digits: int = 1, column: str = "accuracy", by: By = None, **where: Selection) -> str:
    """The greatest, as ``least``."""
    return _number(_values(name, column, by, where).max(), digits, column)


def _values(name: str, column: str, by: By, where: Mapping[str, Selection]) -> pd.Series:
    rows = select(name, **where)
    return rows.groupby(by)[column].mean() if by else rows[column]


def _number(value: float, digits: int, column: str) -> str:
    """With so many digits, a half away from zero: 0.045 is 5 where a mean of floats comes to 0.0449999."""
    exact = Decimal(f"{100 * value if column == 'accuracy' else value:.9f}")
    return f"{exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,}"


def count(name: str, **where: Selection) -> str:
    """The number of rows, which in a study are its cells."""
    return f"{len(select(name, **where)):,}"


def seconds(stage: str) -> str:
    """What a stage of the run in checkpoints/laptop took, "all" for the sum."""
    own = results()["seconds"]
    return f"{sum(own.values()) if stage == 'all' else own[stage]:.0f}"


def printed(notebook: str, text: str, n: int = 0, line: int | None = None) -> str:
    """The n-th number after ``text`` in a notebook's output, in the line-th of the lines that begin with it."""
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    outputs = [each for cell in json.loads(path.read_text())["cells"] for each in cell.get("outputs", [])]
    everything = "\n".join("".join(each.get("text") or each.get("data", {}).get("text/plain", "")) for each in outputs)
    begin = " +".join(map(re.escape, text.split()))
    found = re.findall(rf"^ *{begin}(?![\w+])(.*)$", everything, re.MULTILINE)
    if len(found) != 1 and line is None:
        raise ValueError(f"{len(found)} lines of notebook {notebook} begin with {text!r}; line= says which")
    return re.findall(r"[\d.,]*\d(?:e-\d+)?", found[line or 0])[n]


def published(figure: str) -> str:
    """A figure that somebody else has published; the text says who."""
    return figure


# -------------------------------------------------------------------------------------------------------------- tables


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], n_left: int = 1) -> str:
    """A table whose first ``n_left`` columns are aligned to the left, on lines of its own."""
    lines = [header, ["---"] * n_left + ["--:"] * (len(header) - n_left), *rows]
    return "\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def table(
    name: str,
    rows: str | list[str],
    columns: str | Mapping[str, int] = "task",
    *,
    digits: int = 1,
    value: str = "accuracy",
    means: Mapping[str, str] | None = None,
    order: Mapping[str, Sequence[Any]] | None = None,
    by: str | None = None,
    **where: Selection,
) -> str:
    """Means and standard deviations over seeds, of accuracies in percent; without the deviation where there is one
    result, or more than one of a seed.

    Args:
        name: see ``read``.
        rows: the column, or columns, with a line for each value.
        columns: the column with a column of the table for each value; or the columns that are shown themselves, with
            their digits.
        digits: after the point.
        value: the column that is shown.
        means: further columns, each a mean over the line, with their formats.
        order: by column, its values in the order in which they are shown; others are left out, but values of
            ``columns`` count for ``means`` and ``by``. The first counts most.
        by: order the lines by the mean of this column, "-accuracy" from the largest.
        where: see ``select``.
    """
    rows, order = [rows] if isinstance(rows, str) else rows, order or {}
    found = select(name, **where, **{column: list(values) for column, values in order.items() if column != columns})
    found = found.astype({each: "string" for each in rows if found[each].isna().any()}).fillna(dict.fromkeys(rows, ""))
    lines = list(dict.fromkeys(found[rows].itertuples(index=False, name=None)))
    if by:
        ranks = found.groupby(rows)[by.lstrip("-")].mean() * (-1 if by[0] == "-" else 1)
        lines.sort(key=lambda line: ranks[line if len(line) > 1 else line[0]])
    names = list(columns if isinstance(columns, Mapping) else order.get(columns, dict.fromkeys(found[columns])))
    for column, values in reversed(order.items()):
        if column != columns:
            rank = list(values).index
            lines.sort(key=lambda line, column=column, rank=rank: rank(line[rows.index(column)]))
    text: list[list[str]] = []
    for line in lines:
        own = found[(found[rows] == list(line)).all(axis=1)]
        shown = [f"{own[column].mean():{form}}" for column, form in (means or {}).items()]
        if isinstance(columns, Mapping):
            cells = [_cell(own, digit, column) for column, digit in columns.items()]
        else:
            cells = [_cell(own[own[columns] == each], digits, value) for each in names]
        above = lines[lines.index(line) - 1][0] if text and len(line) > 1 else None
        names_of_line = ["" if above == line[0] else line[0], *line[1:]]
        text.append([*map(_name, names_of_line), *shown, *cells])
    titles = {"n_parameters": "parameters", "learning_rate": "rate", "n_iters": "iterations", "max_iters": "iterations"}
    header = [titles.get(each, _name(each)) for each in (*rows, *(means or {}), *names)]
    return markdown(header, text, len(rows))


def _name(value: Any) -> str:
    """A value as it stands in a header or at the beginning of a line."""
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{value:.2g}" if isinstance(value, float) else str(value).removesuffix(".0")


def _cell(rows: pd.DataFrame, digits: int, column: str) -> str:
    if rows.empty:
        return ""
    many = len(rows) > 1 and "seed" in rows and not rows["seed"].duplicated().any()
    after = f" ± {_number(rows[column].std(), digits, column)}" if many else ""
    return _number(rows[column].mean(), digits, column) + after


def main_table() -> str:
    """The table of ``mingpt reproduce``; an asterisk marks what had not ended at its plateau."""
    found, n_iters = results_table(results()), results()["config"]["prefix"]["max_iters"]
    for kind in KINDS:
        ends, column = results()["n_iters"][kind], found[f"{kind} prefix"]
        cells = [f"{value:.2f}" + r"\*" * (ends.get(task) == n_iters) for task, value in column.items()]
        found[f"{kind} prefix"] = [cell if kind == "activation" or cell == "nan" else f"**{cell}**" for cell in cells]
    found.columns = ["", "without prefix", "published", "activation", "published", "key_value", "as a chain"]
    shown = found.map(lambda cell: f"{cell:.2f}" if isinstance(cell, float) else cell).replace("nan", "").fillna("")
    lines = [[task, *row] for task, row in zip(found.index, shown.to_numpy(), strict=True)]
    return markdown(["task", *found.columns], lines, 2)


def five_seeds_table(preset: str) -> str:
    """Mean, and in brackets the lowest, of five seeds by task and kind of prefix, in percent."""
    own = select("five_seeds", preset=preset)
    of = {kind: 100 * own[own["kind"] == kind].set_index("task")["accuracy"] for kind in reversed(list(KINDS))}
    lines = [
        [task, *(f"{each[task].mean():.2f} ({each[task].min():.2f})" for each in of.values())]
        for task in dict.fromkeys(own["task"])
    ]
    return markdown([f"{preset}, five seeds", *(f"{kind}: mean (lowest)" for kind in of)], lines)


def card(method: str) -> str:
    """What a method came to in the studies: five tasks, after at most 1,000 and 2,500 iterations."""
    sizes = {"methods": "1,000 iterations", "methods_longer": "2,500 iterations"}
    rows = []
    for name, budget in sizes.items():
        if method not in set(read(name)["method"]):
            continue
        own = select(name, method=method)
        tasks = [spread(name, method=method, task=task) if task in set(own["task"]) else "" for task in HARD]
        rows.append([budget, f"{own['n_parameters'].iloc[0]:,}", f"{own['learning_rate'].iloc[0]:.2g}", *tasks])
    return markdown(["at most", "parameters", "rate", *HARD], rows)


def parameters(method: str, size: int | None = None) -> str:
    """How many numbers a method trains beside the stored model, by its formula; at most 7,680 by default."""
    kind, config = METHODS[method], load_model(LAPTOP / "model.safetensors")[0].config
    return f"{kind.count(config, size or size_for(kind, config, 7680, 10)):,}"


# --------------------------------------------------------------------------------------------------------------- pages


def updated(text: str, page: Path) -> str:
    """A page with its results as the files have them.

    Raises:
        ValueError: for a comment that cannot be evaluated or stands wrongly, and for a number that was typed.
    """
    for line, content in enumerate(text.splitlines(), start=1):
        if content.startswith("<!--=") and not re.fullmatch(r"(<!--=.*?-->)+", content):
            raise ValueError(f"{page}:{line}: a line must not begin with a comment: move a word before it")

    def fill(match: re.Match[str]) -> str:
        try:
            found = eval(match["source"], globals())
        except Exception as error:
            raise ValueError(f"{page}: {match['source']}: {error!r}") from error
        return f"<!--= {match['source']} -->{found}<!--=-->"

    rest = NO_CLAIM.sub("", MARKED.sub("", text))
    if rest != NO_CLAIM.sub("", text) and (typed := TYPED.findall(rest)):
        raise ValueError(f"{page}: say where these come from, as {Path(__file__).name} tells: {', '.join(typed)}")
    return MARKED.sub(fill, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Update every page, or with --check compare each."""
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = updated(before, page.relative_to(ROOT))
        if after == before:
            continue
        name = str(page.relative_to(ROOT))
        stale += difflib.unified_diff(
            before.splitlines(), after.splitlines(), name, f"{name}, from the results", "", "", 0, ""
        )
        if "--check" not in sys.argv:
            page.write_text(after, encoding="utf-8")
    print("\n".join(stale) or "every number is that of its file of results")
    if stale and "--check" in sys.argv:
        sys.exit("a number and its file of results differ; python docs/update_numbers.py writes them anew")


if __name__ == "__main__":
    main()
