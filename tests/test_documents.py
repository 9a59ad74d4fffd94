"""README.md and the manual are true: snippets and commands run, each page in a folder with the stored run.

Python blocks of a page share one namespace, as in a notebook. A block that begins with the name of a file is also
written to it. Of other blocks each line is a command of a shell. Only what ``SMALLER`` says is changed before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mingpt import cli

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "checkpoints" / "README.md"]
PAGES += [each for each in sorted((REPOSITORY / "docs").rglob("*.md")) if "generated" not in each.parts]

SMALLER = {
    r"max_iters = 20\b": "max_iters = 2",
    r"max_iters = 2000": "max_iters = 2",
    r"max_iters = \[400\]": "max_iters = [2]",
    r"^seeds = \[0, .*$": "seeds = [0]",
    r"prefix\.max_iters=2500": "prefix.max_iters=3",
    r"^source .*": "true",
    r"^make ": f"make --dry-run --directory {shlex.quote(str(REPOSITORY))} ",
    r"^mingpt prefix (?!.*--set)": "mingpt prefix --set prefix.max_iters=2 ",
    r"--preset seed": "--preset smoke",
    r"runs/seed": "runs/smoke",
    r"--preset text --run checkpoints/text": "--preset text --run runs/text --set trainer.max_iters=2",
    r"-- reproduce ": "-- reproduce --preset smoke ",
}
"""What is made smaller, so that the test ends in time: patterns, and what takes their place."""

BLOCKS = {
    (page, number): block
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
}
"""The language and the text of each block, by its page and number."""

SLOW = ("torchrun", "mingpt prefix", "mingpt reproduce", "mingpt sweep")
"""A block with one of these trains, or starts several processes."""

WORKER = """
import contextlib, io, json, sys, traceback, warnings
warnings.simplefilter("error")
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(json.loads(line), "block", "exec"), namespace)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""
"""Runs each block that it gets in the same namespace, and answers with what was printed and what went wrong."""


class Reader:
    """Someone who follows a page from the top, in a folder of their own."""

    def __init__(self, page: Path, folder: Path):
        self.page, self.folder, self.n_done = page, folder, 0
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PYTHONPATH": str(REPOSITORY), "PATH": path, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        self.environment = os.environ | own
        self.python = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def read_to(self, number: int) -> None:
        """Run this block, and of those before it the ones that are quick and were not run yet."""
        earlier = [each for each in range(self.n_done, number) if not is_slow(BLOCKS[self.page, each][1])]
        self.n_done = number + 1
        for each in [*earlier, number]:
            self.run(each)

    def run(self, number: int) -> None:
        language, block = BLOCKS[self.page, number]
        for pattern, smaller in SMALLER.items():
            block = re.sub(pattern, smaller, block, flags=re.MULTILINE)
        known = {"python": self.run_python, "bash": self.run_shell, "toml": self.write}
        assert language in known, f"block {number} is {language!r}, and the test cannot run that: {block}"
        known[language](block)

    def write(self, block: str) -> None:
        if name := re.match(r"# (\w+\.\w+)\n", block):
            (self.folder / name[1]).write_text(block)

    def run_python(self, block: str) -> None:
        self.write(block)
        assert self.python.stdin
        assert self.python.stdout
        self.python.stdin.write(json.dumps(block) + "\n")
        self.python.stdin.flush()
        printed, error = json.loads(self.python.stdout.readline())
        assert error is None, f"{block}\n{error}"
        for promised in re.findall(r"^print\(.*\) +# (.*)$", block, re.MULTILINE):
            assert promised in printed.splitlines(), f"it says {promised!r}, printed is {printed!r}"

    def run_shell(self, block: str) -> None:
        for command in block.splitlines():
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def is_slow(block: str) -> bool:
    return any(word in block for word in SLOW)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A reader for each page that is read."""
    found: dict[Path, Reader] = {}

    def reader(page: Path) -> Reader:
        if page not in found:
            folder = tmp_path_factory.mktemp(page.stem)
            shutil.copytree(REPOSITORY / "checkpoints" / "laptop", folder / "checkpoints" / "laptop")
            found[page] = Reader(page, folder)
        return found[page]

    yield reader
    for each in found.values():
        with each.python:  # its pipes are closed, which ends it
            pass


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(*key, marks=pytest.mark.slow if is_slow(block) else (), id=f"{name_of(key[0])}-{key[1]}")
        for key, (_, block) in BLOCKS.items()
    ],
)
def test_each_block_runs(readers, page, number):
    readers(page).read_to(number)


def test_all_blocks_are_found():
    text = README.read_text()
    assert sum(page == README for page, _ in BLOCKS) == text.count("\n```") / 2
    assert len(BLOCKS) > 30


@pytest.mark.parametrize("pattern", SMALLER)
def test_what_is_made_smaller_is_there(pattern):
    assert re.search(pattern, "\n".join(block for _, block in BLOCKS.values()), re.MULTILINE)


COMMANDS = [command for page in PAGES for command in re.findall(r"`mingpt ([^`]+?)`", page.read_text())]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_the_commands_within_the_text_are_right(command):
    """Their names and options; what the longer ones do is seen above."""
    name, *arguments = shlex.split(command)
    known = cli.cli.get_command(click.Context(cli.cli), name)
    assert known
    known.make_context(name, arguments)


def test_the_manual_has_the_method_that_the_package_has():
    source = (REPOSITORY / "mingpt/adapters/bitfit.py").read_text()
    assert source in (REPOSITORY / "docs/how_to/method.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_pages_point_to_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    files = re.findall(r"`((?:mingpt|tests|benchmarks|docs|notebooks|checkpoints|studies)/[\w./+-]+)`", text)
    for path in links:
        assert (page.parent / path).exists(), path
    for path in files:
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("script", ["docs/update_numbers.py", "studies/figures.py"])
def test_numbers_and_figures_are_of_the_files_of_results(script):
    """What was changed by hand in a page, or in a file of results, is found."""
    done = subprocess.run([sys.executable, script, "--check"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
