"""README.md is true: its snippets and commands run, one after the other, in a fresh folder with the stored run.

Python blocks share one namespace, as in a notebook; a block that begins with the name of a file is also written to it.
Of other blocks each line is a command of a shell. Only what ``SMALLER`` says is changed before a block runs.
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
README = (REPOSITORY / "README.md").read_text()

SMALLER = {
    r"max_iters = 2000": "max_iters = 2",
    r"prefix\.max_iters=3000": "prefix.max_iters=3",
    r"^make ": f"make --dry-run --directory {shlex.quote(str(REPOSITORY))} ",
    r"^mingpt prefix (?!.*--set)": "mingpt prefix --set prefix.max_iters=2 ",
    r"--preset seed": "--preset smoke",
    r"runs/seed": "runs/smoke",
    r"-- reproduce ": "-- reproduce --preset smoke ",
}
"""What is made smaller, so that the test ends in time: patterns, and what takes their place."""

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SLOW = ("torchrun", "mingpt prefix", "mingpt reproduce")
"""A block with one of these trains, or starts several processes."""

WORKER = """
import contextlib, io, json, sys, traceback, warnings
warnings.simplefilter("error")
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(json.loads(line), "README.md", "exec"), namespace)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""
"""Runs each block that it gets in the same namespace, and answers with what was printed and what went wrong."""


class Reader:
    """Someone who follows README.md from the top, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder, self.n_done = folder, 0
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PYTHONPATH": str(REPOSITORY), "PATH": path, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        self.environment = os.environ | own
        self.python = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def read_to(self, number: int) -> None:
        """Run this block, and of those before it the ones that are quick and were not run yet."""
        earlier = [each for each in range(self.n_done, number) if not is_slow(BLOCKS[each][1])]
        self.n_done = number + 1
        for each in [*earlier, number]:
            self.run(each)

    def run(self, number: int) -> None:
        language, block = BLOCKS[number]
        for pattern, smaller in SMALLER.items():
            block = re.sub(pattern, smaller, block, flags=re.MULTILINE)
        known = {"python": self.run_python, "bash": self.run_shell}
        assert language in known, f"block {number} is {language!r}, and the test cannot run that: {block}"
        known[language](block)

    def run_python(self, block: str) -> None:
        if name := re.match(r"# (\w+\.py)\n", block):
            (self.folder / name[1]).write_text(block)
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


def is_slow(block: str) -> bool:
    return any(word in block for word in SLOW)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "checkpoints" / "laptop", folder / "checkpoints" / "laptop")
    reader = Reader(folder)
    with reader.python:  # its pipes are closed at the end, which ends it
        yield reader


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=pytest.mark.slow if is_slow(block) else ()) for i, (_, block) in enumerate(BLOCKS)],
)
def test_each_block_runs(reader, number):
    reader.read_to(number)


def test_all_blocks_are_found():
    assert len(BLOCKS) == README.count("\n```") / 2
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("pattern", SMALLER)
def test_what_is_made_smaller_is_there(pattern):
    assert re.search(pattern, "\n".join(block for _, block in BLOCKS), re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(re.findall(r"`mingpt ([^`]+?)`", README)))
def test_the_commands_within_the_text_are_right(command):
    """Their names and options; what the longer ones do is seen above."""
    name, *arguments = shlex.split(command)
    known = cli.cli.get_command(click.Context(cli.cli), name)
    assert known
    known.make_context(name, arguments)


PAGES = ["README.md", "CONTRIBUTING.md", "checkpoints/README.md"]
PAGES += [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").rglob("*.md"))]


def test_the_manual_has_the_method_that_the_package_has():
    source = (REPOSITORY / "mingpt/adapters/bitfit.py").read_text()
    assert source[source.index("class BitFit") :] in (REPOSITORY / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_point_to_is_there(page):
    text = (REPOSITORY / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    files = re.findall(r"`((?:mingpt|tests|benchmarks|docs|notebooks|checkpoints|studies)/[\w./+-]+)`", text)
    for path in links:
        assert ((REPOSITORY / page).parent / path).exists(), path
    for path in files:
        assert (REPOSITORY / path).exists(), path
