"""What commands print: results to standard output, everything else to standard error, by the main process."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from mingpt.evaluation import Score


def is_main() -> bool:
    """Whether this process prints. Unlike ``distributed.is_main`` it does not wait for the other processes."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


def echo(text: str, err: bool = False) -> None:
    """Print on the main process."""
    if is_main():
        click.echo(text, err=err)


def echo_result(values: Any, text: str, as_json: bool) -> None:
    """Print a command's results, as JSON or as text."""
    echo(json.dumps(values, indent=1, default=str) if as_json else text)


def echo_scores(scores: dict[str, Score], as_json: bool) -> None:
    line = "{:24} {}/{} = {:.2%} (95% interval {:.2%} - {:.2%})"
    lines = [line.format(k, s.n_correct, s.n_rows, s.accuracy, *s.confidence_interval) for k, s in scores.items()]
    echo_result({name: score.to_dict() for name, score in scores.items()}, "\n".join(lines), as_json)
