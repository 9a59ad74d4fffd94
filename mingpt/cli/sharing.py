"""Commands that hand a run on: to transformers and PEFT, and to the lab page; and those that look at others' models."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import shutil
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError

from mingpt import distributed, lab
from mingpt.analysis.figures import save_figure
from mingpt.cli.group import cli
from mingpt.cli.options import (
    FILE,
    FOLDER,
    RUN_HELP,
    analyses_option,
    find_prefix,
    folder_of,
    json_option,
    load,
    load_options,
    studies_option,
    wait_option,
)
from mingpt.cli.output import echo, echo_result, is_main
from mingpt.huggingface.adapters import load_causal_lm, load_peft, without_progress_bar
from mingpt.huggingface.analysis import analyze as analyze_adapter
from mingpt.huggingface.analysis import read_rows
from mingpt.huggingface.comparison import MAX_EXAMPLES, compare
from mingpt.storage import huggingface
from mingpt.storage.files import locked, naming


@cli.command()
@click.argument("out", metavar="OUT", type=FOLDER)
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="Whose prefix to export; may be repeated. [all]")
@load_options
@wait_option
def export(out: Path, tasks: tuple[str, ...], wait: bool, **options: Any) -> None:
    """Write the model for transformers into OUT/model, and each prefix for PEFT into OUT/TASK."""
    importlib.import_module("peft")  # it may be missing, and transformers with it: better now than half way
    folder = out.with_name(f".{out.name}.partial")
    with locked(folder / ".lock", wait):
        if distributed.run_on_main(out.exists):
            raise ValueError(f"{out} exists; remove it or choose another folder")
        model, prefixes, _, run = load(**options)
        chosen = dict(find_prefix(prefixes, name, run) for name in tasks or prefixes)
        if is_main():
            shutil.rmtree(folder / "all", ignore_errors=True)  # of an export that was cut off
            try:
                with naming(folder), without_progress_bar():
                    huggingface.to_huggingface(model).save_pretrained(folder / "all" / "model")
                    for name, prefix in chosen.items():
                        huggingface.export_peft(model, prefix, folder / "all" / name)
                    (folder / "all").rename(out)
            except SafetensorError as error:
                raise OSError(str(error)) from None
            finally:
                shutil.rmtree(folder / "all", ignore_errors=True)
    echo(f"GPT2LMHeadModel.from_pretrained({str(out / 'model')!r}) reads the model")
    echo(f"PeftModel.from_pretrained(model, {str(out / next(iter(chosen), 'TASK'))!r}) adds a prefix")


@cli.command()
@click.argument("model", metavar="MODEL", type=FOLDER)
@click.argument("adapter", metavar="ADAPTER", type=FOLDER)
@click.option("--text", required=True, type=FILE, help="What to read: text, or token ids as JSON in each line.")
@click.option("--rows", default=16, type=click.IntRange(min=1), help="The most rows of the text.")
@click.option("--length", default=128, type=click.IntRange(min=2), help="Tokens in a row.")
@click.option("--examples", type=FILE, help=f"Other rows, to compare with; the first {MAX_EXAMPLES:,} are used.")
@click.option("--demonstrations", type=click.IntRange(min=0), help="Examples before a row. [those that fit, at most 8]")
@click.option("--lora-iters", type=click.IntRange(min=0), help="Iterations of the LoRA on the examples. [200]")
@click.option("--score-last", type=click.IntRange(min=1), help="Compare on a row's last tokens. [all but the first]")
@click.option("--figures", metavar="FOLDER", type=FOLDER, help="Write heatmaps by layer and head there.")
@click.option("--page", metavar="FILE", type=FILE, help="Write all of it as one HTML file, such as analysis.html.")
@click.option("--device", metavar="NAME", default="cpu", help="auto, cpu, cuda or cuda:N.")
@json_option
def analyze(
    model: Path,
    adapter: Path,
    text: Path,
    rows: int,
    length: int,
    examples: Path | None,
    demonstrations: int | None,
    lora_iters: int | None,
    score_last: int | None,
    figures: Path | None,
    page: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure what ADAPTER does to MODEL on a text, in each layer and head.

    MODEL is a folder that transformers wrote, ADAPTER one that PEFT wrote: prefix tuning, a cartridge, prompt tuning,
    or LoRA and the like. Nothing is fetched. Text is read by the model's own tokenizer; where its folder has none, each
    line of the file is a row of token ids, such as [6, 2, 7].

    With --examples the adapter's gain is compared with that of examples in the context, and of a LoRA trained on them:
    where a model learns in context, demonstrations can replace an adapter that only elicits what it knows.
    """
    given = {"n_demonstrations": demonstrations, "lora_iters": lora_iters, "n_scored": score_last}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not examples:
        raise click.UsageError("--demonstrations, --lora-iters and --score-last are for --examples; give it too")
    for path in (model, adapter, text, examples or text):
        if not path.exists():
            raise click.UsageError(f"there is no {path}; expected MODEL and ADAPTER, which are folders, and a text")
    lm = load_causal_lm(model, distributed.resolve_device(device))
    found = load_peft(adapter, lm)
    room = lm.block_size - (found.prefix.n_positions if found.prefix else 0)
    x = read_rows(text, model, rows, min(length, room)).to(lm.device)
    result = analyze_adapter(lm, found, x)
    if examples:
        own = read_rows(examples, model, MAX_EXAMPLES, min(length, room)).to(lm.device)
        result = result._replace(comparison=compare(lm, found, x, own, **given))
    echo_result(result.to_dict(), result.table(), as_json)
    if found.base and Path(found.base).name != model.resolve().name:
        echo(f"the adapter names {found.base} as its base; that {model} is this model was not checked", err=True)
    if figures and is_main():
        for name, figure in result.figures().items():
            save_figure(figure, figures / f"{name}.png")
        echo(f"figures are in {figures}", err=True)
    if page and is_main():
        lab.write_analysis(result, page, shlex.join(["mingpt", *sys.argv[1:]]))
        echo(f"{page}, {page.stat().st_size / 1e3:.0f} kB; open it in a browser", err=True)


@cli.command("report")
@click.option("--run", metavar="FOLDER", type=FOLDER, help=RUN_HELP)
@click.option("--out", metavar="FILE", type=FILE, default="lab.html", help="The page.")
@studies_option
@analyses_option
@click.option("--half", "use_half", is_flag=True, help="float16 weights: half the size, a few other answers.")
def write_lab_page(
    run: Path | None, out: Path, studies: tuple[Path, ...], analyses: tuple[Path, ...], use_half: bool
) -> None:
    """Write the lab page of a run: one HTML file in which its model answers, and its prefixes can be mixed."""
    lab.write_report(folder_of(run), out, _studies(studies), use_half, analyses)
    echo(f"{out}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


@cli.command("lab")
@click.option("--run", metavar="FOLDER", type=FOLDER, help=RUN_HELP)
@studies_option
@analyses_option
@click.option("--port", type=click.IntRange(0, 65535), help="Of 127.0.0.1. [any free one]")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def open_lab(
    run: Path | None, studies: tuple[Path, ...], analyses: tuple[Path, ...], port: int | None, no_browser: bool
) -> None:
    """Open the lab page of a run in the browser; its curves grow while the run is trained."""
    with lab.LabServer(folder_of(run), _studies(studies), port or 0, analyses) as server:
        server.page()  # before a browser waits for it
        echo(f"{server.url}\nCtrl-C ends it")
        if not no_browser:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _studies(folders: Sequence[Path]) -> list[Path]:
    """These folders of studies, or else those in the current folder that have results."""
    for folder in folders:
        if not (folder / "results.csv").is_file():
            raise click.UsageError(f"no results.csv in {folder}; 'mingpt sweep {folder}.toml' makes it")
    return list(folders) or [path.parent for path in sorted(Path("studies").glob("*/results.csv"))]
