"""The command line: what it prints, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file

import mingpt.evaluation
from mingpt import cli, distributed
from mingpt.decoding import constraints
from mingpt.experiments import multistep, pipeline
from mingpt.model import GPT
from mingpt.storage import huggingface, weights
from mingpt.tasks import SIMPLE_TASKS, Task

TINY = [
    *("--preset", "smoke", "--set", "model.n_embd=8", "--set", "trainer.max_iters=2", "--set", "prefix.max_iters=2"),
    *("--set", "prefix.batch_size=2", "--set", "evaluation.n_rows=10", "--set", "evaluation.n_matrix_rows=5"),
]
TASKS = ["SortAscending", "Add1", "LessThan", "Modulo", "SortAscending+Add1"]
ROW = "6 2 7 6 7 5 3 6 6 10"
ROWS = [[6, 2, 7, 6, 7, 5, 3, 6, 6, 10], [1, 1, 2, 3, 5, 8, 1, 2, 3, 4], [4] * 10]
MODULO_ROWS = [[2, 5, 7, 6, 7, 5, 3, 6, 6, 10], [0, 1, 2, 3, 5, 8, 1, 2, 3, 4]]
"""Modulo is defined on the first of these, and not on the second: nothing can be divided by 0."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns its exit code, its standard output and its standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mingpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, made without --run."""
    home = tmp_path_factory.mktemp("cli")
    environment = os.environ | {"PYTHONPATH": str(Path(mingpt.__file__).parents[1])}
    command = [sys.executable, "-m", "mingpt", "reproduce", *TASKS, *TINY]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert "SortAscending+Add1" in done.stdout
    assert "run: runs/smoke\n" in done.stderr
    assert "Warning" not in done.stderr
    return home / "runs" / "smoke"


@pytest.fixture
def copy(folder, tmp_path, monkeypatch):
    """A copy of that run, to change, as the only one in the current folder's runs."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folder, "runs/copy"))


@pytest.fixture
def stored(folder, tmp_path, monkeypatch):
    """A copy of that run as the stored one, as in a fresh clone, where there is no folder runs."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folder, "checkpoints/laptop", copy_function=shutil.copyfile))


def contents(folder):
    """Each file of a folder by its name in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def files(tmp_path):
    """A file of rows, and one that is not there yet."""
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(f"{row}\n" for row in ROWS))
    return rows, tmp_path / "out.jsonl"


# ----------------------------------------------------------------------------------------------------------- runs


def test_the_same_command_again_says_that_it_is_done(run, folder):
    code, out, _ = run("reproduce", *TASKS, "--run", folder)
    assert code == 0
    assert "all seven mixed" in out


def test_a_run_keeps_its_settings_for_later_commands(run, folder):
    code, out, err = run("config", "--run", folder)
    assert (code, err) == (0, "")
    assert "preset: smoke" in out
    assert "n_embd: 8" in out
    code, _, err = run("reproduce", "--run", folder, "--seed", 1)
    assert code == 2
    assert "seed" in err
    assert len(err.splitlines()) == 1


def test_the_run_that_changed_last_is_the_default_and_named_on_standard_error(run, copy):
    shutil.copytree(copy, "runs/older")
    for path in Path("runs/older").rglob("*"):
        os.utime(path, (1, 1))
    code, out, err = run("eval", "--rows", 3, "Add1")
    assert code == 0
    assert out.startswith("Add1 ")
    assert err.splitlines()[0] == "run: runs/copy"
    assert "run:" not in run("eval", "--rows", 3, "Add1", "--run", "runs/older")[2]
    code, out, err = run("config")
    assert (out.splitlines()[0], err) == ("preset: smoke", "run: runs/copy\n")
    assert run("config", "--preset", "seed")[2] == "run: runs/seed\n"


def test_a_command_without_any_run_says_how_to_make_one(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("eval")
    assert (code, out) == (2, "")
    assert "error: no model in runs/laptop; 'mingpt reproduce' makes one" in err
    assert run("runs")[1] == "no runs; 'mingpt reproduce' makes one\n"


def test_what_writes_works_in_a_copy_of_the_stored_run(run, stored):
    before = contents(stored)
    code, out, err = run("prefix", "Add1+Add1")
    assert code == 0, err
    assert err.startswith("run: runs/laptop, which starts as a copy of checkpoints/laptop\n")
    assert err.count("run: ") == 1
    assert "the prefixes are in runs/laptop/prefixes" in err
    assert contents(stored) == before
    assert [path.name for path in Path("runs").iterdir()] == ["laptop"]
    assert {name: contents("runs/laptop").get(name) for name in before} == before
    assert Path("runs/laptop/prefixes/Add1+Add1.safetensors").exists()
    code, again, err = run("eval", "Add1+Add1", "--rows", 10)
    assert (code, again, err) == (0, out, "run: runs/laptop\n")
    assert "run: runs/laptop\n" in run("prefix", "LessThan+Add1")[2]
    assert contents(stored) == before


def test_what_only_reads_uses_the_stored_run_and_says_so(run, stored):
    before = contents(stored)
    for command in (["eval", "Add1", "--rows", 3], ["generate", ROW, "--task", "Add1"], ["config"]):
        code, _, err = run(*command)
        assert (code, err) == (0, "run: checkpoints/laptop\n")
    code, _, err = run("generate", ROW, "--task", "Add1+Add1")  # the command that it names writes into a copy too
    assert (code, err.endswith("; mingpt prefix 'Add1+Add1' makes it\n")) == (2, True)
    code, _, err = run("prefix", "Add1", "--set", "max_iters=3")
    assert code == 2
    assert "did you mean 'trainer.max_iters' or 'prefix.max_iters'?" in err
    assert not Path("runs").exists()
    assert contents(stored) == before


def test_the_stored_run_is_written_where_it_is_named(run, stored):
    code, _, err = run("prefix", "Add1+Add1", "--run", stored)
    assert (code, "run: " in err) == (0, False)
    assert (stored / "prefixes" / "Add1+Add1.safetensors").exists()
    assert not Path("runs").exists()


def test_runs_are_listed_with_their_state(run, copy):
    code, out, _ = run("runs")
    assert code == 0
    assert out.split()[:5] == ["runs/copy", "done", "smoke,", "seed", "0,"]
    (copy / "results.json").unlink()
    assert run("runs", "--run", copy)[1] == run("runs")[1]
    (found,) = json.loads(run("runs", "--json")[1])
    assert (found["path"], found["state"], found["preset"], found["seed"]) == ("runs/copy", "5 prefixes", "smoke", 0)
    shutil.rmtree(copy / "prefixes")
    assert json.loads(run("runs", "--json")[1])[0]["state"] == "pretrained"


def test_reproduce_takes_tasks(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("reproduce", "Add1", "LessThan+Add1", *TINY, "--json")
    assert code == 0, err
    assert list(json.loads(out)["tasks"]) == ["Add1", "LessThan+Add1"]
    assert sorted(path.stem for path in Path("runs/smoke/prefixes").glob("*.safetensors")) == ["Add1", "LessThan+Add1"]


def test_a_device_is_set_for_all_training_and_checked_first(run, copy, monkeypatch):
    out = run("config", "--device", "cpu")[1]
    assert out.count("device: cpu\n") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["pretrain", "--run", "new"], ["prefix", "Add1+Add1"], ["eval", "Add1"], ["generate", ROW]):
        code, out, err = run(*command, "--device", "cuda")
        assert (code, out) == (2, "")
        assert "cuda" in err.splitlines()[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["runs"]


# -------------------------------------------------------------------------------------------- prefixes and scores


def test_a_prefix_is_trained_and_then_evaluated_in_the_default_run(run, copy):
    code, out, err = run("prefix", "Add1+Add1")
    assert code == 0, err
    assert (copy / "prefixes" / "Add1+Add1.safetensors").exists()
    assert run("eval", "Add1+Add1", "--rows", 10)[1] == out
    assert out.startswith("Add1+Add1 ")


def test_eval_scores_the_named_tasks_or_every_prefix(run, folder):
    code, out, _ = run("eval", "--run", folder, "--rows", 10, "Add1", "SortAscending+Add1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["Add1", "SortAscending+Add1"]
    out = run("eval", "--run", folder, "--rows", 3)[1]
    assert sorted(line.split()[0] for line in out.splitlines()) == sorted(
        path.stem for path in (folder / "prefixes").glob("*.safetensors")
    )
    assert "/3 = " in run("eval", "--run", folder, "--rows", 3, "--without-prefix", "Add1+Add1")[1]


@pytest.mark.parametrize("command", [["eval", "Add1+Add1+Add1"], ["generate", ROW, "--task", "Add1+Add1+Add1"]])
def test_a_task_without_a_prefix_says_which_there_are_and_what_makes_it(run, folder, command):
    code, out, err = run(*command, "--run", folder)
    assert (code, out) == (2, "")
    assert f"no prefix for Add1+Add1+Add1 in {folder}; there is one for " in err
    assert f"mingpt prefix 'Add1+Add1+Add1' --run {folder} makes it" in err


def test_a_prefix_of_another_kind_is_made_beside_the_first(run, copy):
    before = (copy / "prefixes" / "Add1.safetensors").read_bytes()
    code, _, err = run("prefix", "Add1", "--kind", "prompt")
    assert code == 0, err
    assert (copy / "prefixes" / "Add1.safetensors").read_bytes() == before
    (path,) = (copy / "prefixes").glob("Add1-*.safetensors")
    assert [list(tensor.shape) for tensor in load_file(path).values()] == [[1, 10, 8]]
    code, out, err = run("eval", path.stem, "--rows", 3)
    assert code == 0, err
    assert out.startswith(f"{path.stem} ")
    assert run("prefix", "Add1", "--kind", "prefix")[0] == 2


def test_prefix_evaluates_in_the_precision_of_the_settings(run, copy, monkeypatch):
    precisions, evaluate = [], mingpt.evaluation.evaluate

    def record(*arguments, **options):
        precisions.append(options.get("precision"))
        return evaluate(*arguments, **options)

    monkeypatch.setattr(cli.experiments, "evaluate", record)
    assert run("prefix", "Add1", "--set", "evaluation.precision=float32")[0] == 0
    assert precisions == ["float32"]


def test_a_model_saved_without_its_data_is_one_line(run, tmp_path):
    config = GPT.get_default_config()
    config.merge_from_dict(
        {"model_type": None, "n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 13, "block_size": 29}
    )
    weights.save_model(tmp_path / "model.safetensors", GPT(config))
    for command in (["eval", "Add1"], ["generate", ROW]):
        code, out, err = run(*command, "--run", tmp_path)
        assert (code, out) == (2, "")
        assert "was saved without a description of its data" in err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- own tasks

OWN = '''
import numpy as np
from mingpt.tasks import Task


class {name}(Task):
    """The row backwards."""

    def solve(self, x):
        return np.ascontiguousarray(x[..., ::-1])
'''


def test_own_tasks_of_a_file_and_of_a_module_are_known_to_every_command(run, copy, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("elsewhere").mkdir()
    Path("elsewhere/own_file.py").write_text(OWN.format(name="ReverseOfFile"))
    Path("own_module.py").write_text(OWN.format(name="ReverseOfModule"))
    both = ["--import", "elsewhere/own_file.py", "--import", "own_module"]
    code, out, err = run("prefix", "ReverseOfFile+Add1", "ReverseOfModule", *both)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["ReverseOfFile+Add1", "ReverseOfModule"]
    assert run("eval", "ReverseOfFile+Add1", "ReverseOfModule", *both, "--rows", 10)[1] == out
    listed = json.loads(run("tasks", "--json", *both)[1])
    (sample,) = [each for each in listed if each["task"] == "ReverseOfFile"]
    assert sample["solution"] == sample["input"][::-1]


def test_without_its_file_a_task_is_left_out_and_said_to_be(run, copy, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("rotating.py").write_text(OWN.format(name="ReverseOfFile") + OWN_WITH_PARAMETER)
    assert "RotateOfFile(n)" in run("tasks", "--import", "rotating.py")[1]
    assert run("prefix", "RotateOfFile(2)", "--import", "rotating.py")[0] == 0
    code, _, err = run("eval", "Add1+Add1", "--import", "rotating.py")
    assert code == 2
    assert " --import rotating.py makes it" in err
    monkeypatch.delitem(Task._classes, (Task, "RotateOfFile"))  # as in another process
    code, out, err = run("eval", "--rows", 10)
    assert code == 0, err
    assert "RotateOfFile(2) is left out: no such task is known; --import its file" in err
    assert len(out.splitlines()) == len(TASKS)
    code, _, err = run("report", "--out", "lab.html")
    assert code == 0, err
    assert "nothing is right for it: RotateOfFile(2)" in caplog.text


OWN_WITH_PARAMETER = """
class RotateOfFile(Task):
    def __init__(self, n):
        self.n = n

    def solve(self, x):
        return np.roll(x, self.n, axis=-1)

    def output_values(self, values, length):
        return values.map(lambda _: values.all)
"""


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("not_there.py", None, "there is no such file"),
        ("README.md", "", "it is no .py file"),
        ("not_there", None, "No module named 'not_there'"),
        ("no/file.py", None, "there is no such file"),
        ("checkpoints", None, "it is no module with a file"),
        ("json.py", "", "another module is named json; rename the file"),
        ("broken_1.py", "1 / 0", "ZeroDivisionError"),
        ("broken_2.py", "def", "SyntaxError"),
    ],
)
def test_an_import_that_fails_is_one_line(run, tmp_path, monkeypatch, name, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("checkpoints").mkdir()
    if source is not None:
        Path(name).write_text(source)
    code, out, err = run("reproduce", "--import", name, *TINY)
    assert (code, out) == (2, "")
    assert f"cannot import {name}: " in err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_every_command_has_import(run):
    for command in cli.cli.commands:
        assert "--import" in run(command, "--help")[1]


# --------------------------------------------------------------------------------------------------------- answers


def test_generate_answers_a_row(run, folder):
    code, out, _ = run("generate", "--run", folder, "--task", "Add1", ROW)
    assert code == 0
    assert len(out.split()) == 10
    assert all(0 <= int(word) < 13 for word in out.split())
    assert run("generate", "--run", folder, "--sample", "--seed", 3, ROW) == run(
        "generate", "--run", folder, "--sample", "--seed", 3, ROW
    )


def test_predict_answers_each_row_of_a_file_as_generate_does(run, folder, files):
    _, output = files
    assert run("predict", *files, "--run", folder, "--task", "Add1", "--batch-size", 2)[0] == 0
    for row, line in zip(ROWS, output.read_text().splitlines(), strict=True):
        _, out, _ = run("generate", "--run", folder, "--task", "Add1", " ".join(map(str, row)))
        assert json.loads(line) == [int(word) for word in out.split()]
    assert list(output.parent.glob("out*")) == [output]
    before = output.read_bytes()
    code, _, err = run("predict", *files, "--run", folder, "--task", "LessThan")
    assert code == 2
    assert err.startswith(f"error: {output} exists; remove it or choose another file")
    assert len(err.splitlines()) == 1
    assert output.read_bytes() == before


def test_predict_samples_with_a_temperature_and_from_the_top_k(run, folder, files):
    outputs = []
    for options in ([], ["--sample", "--top-k", 1], ["--sample"], ["--sample", "--temperature", 1e-7]):
        code, _, err = run("predict", *files, "--run", folder, "--task", "Add1", *options)
        assert code == 0, err
        outputs.append(files[1].read_text())
        files[1].unlink()
    greedy, top, sampled, cold = outputs
    assert top == cold == greedy
    assert sampled != greedy


@pytest.mark.parametrize("option", [["--temperature", 0.5], ["--top-k", 3], ["--temperature", 1.0]])
def test_a_temperature_or_top_k_without_sample_is_refused(run, folder, files, option):
    for command in (["generate", ROW], ["predict", *files]):
        code, out, err = run(*command, "--run", folder, "--task", "Add1", *option)
        assert (code, out) == (2, "")
        assert "--temperature and --top-k are for sampling; give --sample too" in err
    assert not files[1].exists()


def test_chain_answers_in_steps_and_measures_each(run, folder, files):
    _, output = files
    command = ["chain", *files, "--run", folder, "--task", "SortAscending+Add1", "--constrained"]
    code, out, err = run(*command)
    assert code == 0, err
    lines = output.read_text().splitlines()
    for shown, step, task in zip(
        out.splitlines(), ("1-SortAscending", "2-Add1"), ("SortAscending", "SortAscending+Add1"), strict=True
    ):
        n_right = sum(
            json.loads(line)[step] == torch_task(task)(row).tolist() for row, line in zip(ROWS, lines, strict=True)
        )
        assert shown.split()[:2] == [step, f"{100 * n_right / 3:.2f}%"]
    for row, line in zip(ROWS, lines, strict=True):
        answers = json.loads(line)
        assert list(answers) == ["1-SortAscending", "2-Add1"]
        assert sorted(answers["1-SortAscending"]) == sorted(row)
        assert all(2 <= value <= 11 for value in answers["2-Add1"])
    assert list(output.parent.glob("out*")) == [output]
    output.unlink()
    assert list(json.loads(run(*command, "--json")[1])) == ["1-SortAscending", "2-Add1"]


def torch_task(name):
    """The task as a function from a list to a tensor."""
    return lambda row: Task.parse(name)(torch.tensor(row))


@pytest.mark.parametrize("command", [["predict", "--task", "Modulo"], ["chain", "--task", "Modulo+Add1"]])
def test_a_row_on_which_the_task_is_not_defined_is_named_before_anything_is_written(run, folder, files, command):
    rows, output = files
    rows.write_text("".join(f"{row}\n" for row in MODULO_ROWS))
    code, out, err = run(command[0], *files, "--run", folder, *command[1:])
    assert (code, out) == (2, "")
    assert f"line 2 of {rows}: {command[2]} is not defined on [0, 1, 2, 3, 5, 8, 1, 2, 3, 4]" in err
    assert len(err.splitlines()) == 1
    assert list(output.parent.glob("out*")) == []
    rows.write_text(f"{MODULO_ROWS[0]}\n")
    assert run(command[0], *files, "--run", folder, *command[1:])[0] == 0


def test_chain_writes_nothing_where_it_cannot_measure(run, folder, files, monkeypatch):
    def evaluate(*_):
        raise ValueError("cannot be measured")

    monkeypatch.setattr(multistep, "evaluate", evaluate)
    code, out, err = run("chain", *files, "--run", folder, "--task", "Add1")
    assert (code, out) == (2, "")
    assert "cannot be measured" in err
    assert not files[1].exists()


@pytest.mark.parametrize("line", ["[1, 2]", "6 2 7", "[" + "99, " * 9 + "1]", "[" + "1.5, " * 9 + "1]", '{"a": 1}', ""])
def test_a_line_that_is_no_row_is_named(run, folder, files, line):
    rows, output = files
    rows.write_text(f"{ROWS[0]}\n{line}\n")
    code, _, err = run("predict", *files, "--run", folder, "--task", "Add1")
    assert code == 2
    assert f"line 2 of {rows} must be a list of 10 integers from 0 to 12, got {line!r}" in err
    assert len(err.splitlines()) == 1
    assert list(output.parent.glob("out*")) == []


@pytest.mark.parametrize("row", ["1 2 3", "a b c d e f g h i j", "99 " * 10, "1.5 " * 10, "1 " * 9 + "-1", ""])
def test_a_row_that_the_model_cannot_read_is_refused(run, folder, row):
    code, out, err = run("generate", "--run", folder, row)
    assert (code, out) == (2, "")
    assert "the row must be a list of 10 integers from 0 to 12" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "task", "expected"),
    [
        (ROW, "Add1", ""),
        ("0 1 0 1 0 1 0 1 0 1", None, ""),
        ("11 2 7 6 7 5 3 6 6 10", "Add1", "rows of 1 to 10, so"),
        ("6 2 7 6 7 5 3 6 6 0", "SortAscending+Add1", "rows of 1 to 10, so"),
        ("6 2 7 6 7 5 3 6 6 10", "Modulo", "rows of 2 to 5, then 1 to 10, so"),
        ("6 2 7 6 7 5 3 6 6 12", None, "rows of 1 to 10; or of 2 to 5, then 1 to 10; or of 0 to 1, so"),
    ],
)
def test_a_row_of_numbers_that_were_in_no_training_gets_a_warning(run, folder, row, task, expected):
    code, out, err = run("generate", "--run", folder, row, *(["--task", task] if task else []))
    assert (code, len(out.split())) == (0, 10)
    if not expected:
        assert err == ""
    else:
        assert err == f"warning: the row: training had only {expected} the answer may be anything\n"


@pytest.mark.parametrize("command", [["predict", "--task", "Add1"], ["chain", "--task", "Add1+LessThan"]])
def test_the_rows_of_a_file_that_were_in_no_training_get_one_warning(run, folder, files, command):
    rows = [ROWS[0], [11] * 10, ROWS[1], [0] * 10]
    for n_rows, more in ((1, None), (2, ""), (4, " and 1 more")):
        files[0].write_text("".join(f"{row}\n" for row in rows[:n_rows]))
        code, _, err = run(command[0], *files, "--run", folder, *command[1:])
        assert code == 0, err
        text = (
            f"warning: line 2 of {files[0]}{more}: training had only rows of 1 to 10, so the answer may be anything\n"
        )
        assert err == ("" if more is None else text)
        files[1].unlink()
    files[0].write_text("")
    assert run(command[0], *files, "--run", folder, *command[1:])[2] == ""


def test_generate_refuses_a_row_on_which_the_task_is_not_defined(run, folder):
    code, out, err = run("generate", "--run", folder, "--task", "Modulo", "0 2 7 6 7 5 3 6 6 10")
    assert (code, out) == (2, "")
    assert err.startswith("error: the row: Modulo is not defined on [0, 2, 7, 6, 7, 5, 3, 6, 6, 10]: ")


@pytest.mark.parametrize(
    ("options", "is_right"),
    [
        (["--constraint", "sorted"], lambda answer: answer == sorted(answer)),
        (["--constraint", "descending", "--sample"], lambda answer: answer == sorted(answer, reverse=True)),
        (["--constraint", "permutation"], lambda answer: sorted(answer) == sorted(map(int, ROW.split()))),
        (["--regex", "0* (3|5)+ 12", "--sample"], lambda answer: answer[-1] == 12 and set(answer[:9]) <= {0, 3, 5}),
        (["--regex", "10 .*", "--constraint", "permutation"], lambda answer: answer[0] == 10 and sum(answer) == 58),
    ],
)
def test_generate_keeps_to_constraints(run, folder, options, is_right):
    code, out, _ = run("generate", "--run", folder, *options, ROW)
    assert code == 0
    answer = list(map(int, out.split()))
    assert len(answer) == 10
    assert is_right(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "(1 2"], "the regular expression '(1 2' does not parse"),
        (["--regex", "1 13"], "'13', which is no token from 0 to 12"),
        (["--regex", "(1 2 3)*"], "accepts nothing of 10 tokens; the first lengths that it accepts: 0, 3, 6"),
        (["--constraint", "short"], "'short' is not one of"),
        (["--regex", "11 .*", "--constraint", "permutation"], "nothing may follow in row 0 at step 0"),
    ],
)
def test_a_constraint_that_nothing_satisfies_is_refused(run, folder, options, message):
    code, out, err = run("generate", "--run", folder, *options, ROW)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- export


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT and transformers among themselves
def test_export_writes_what_transformers_and_peft_read(run, folder, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    out = tmp_path / "exported"
    code, printed, err = run("export", out, "--run", folder, "--task", "Add1", "--task", "SortAscending+Add1")
    assert code == 0, err
    assert len(printed.splitlines()) == 2
    assert sorted(path.name for path in out.iterdir()) == ["Add1", "SortAscending+Add1", "model"]
    assert list(tmp_path.iterdir()) == [out]
    model = transformers.GPT2LMHeadModel.from_pretrained(out / "model")
    loaded = peft.PeftModel.from_pretrained(model, str(out / "Add1")).eval()
    row = torch.tensor(ROWS[:1])
    tokens = loaded.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False)
    _, expected, _ = run("generate", "--run", folder, "--task", "Add1", " ".join(map(str, ROWS[0])))
    assert tokens[0, 10:].tolist() == [int(word) for word in expected.split()]
    assert run("export", out, "--run", folder)[0] == 2


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_export_without_its_extra_is_one_line_and_writes_nothing(run, folder, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = run("export", tmp_path / "exported", "--run", folder)
    assert (code, out) == (2, "")
    assert "pip install 'mingpt-prefix-tuning[hf]'" in err
    assert missing in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_that_fails_half_way_leaves_nothing(run, folder, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")

    def export_peft(*_):
        raise ValueError("cannot be exported")

    monkeypatch.setattr(huggingface, "export_peft", export_peft)
    code, out, err = run("export", tmp_path / "deep" / "exported", "--run", folder)
    assert (code, out) == (2, "")
    assert "cannot be exported" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --------------------------------------------------------------------------------------------------- what is shown


def test_tables_are_one_json_document_on_standard_output(run, folder, files):
    results = json.loads(run("reproduce", "--run", folder, "--json")[1])
    assert results["tasks"]["Add1"]["key_value"]["n_rows"] == 10
    code, out, err = run("eval", "--run", folder, "--rows", 10, "--json", "Add1")
    assert code == 0, err
    assert json.loads(out)["Add1"] == results["tasks"]["Add1"]["key_value"]


def test_inspect_says_what_a_file_is(run, folder):
    code, out, _ = run("inspect", folder / "model.safetensors")
    assert code == 0
    assert '"kind": "model"' in out
    assert "(13, 8)" in out


def test_tasks_lists_each_with_a_right_sample(run):
    code, out, _ = run("tasks")
    assert code == 0
    lines = out.splitlines()
    for task in SIMPLE_TASKS:
        (place,) = [i for i, line in enumerate(lines) if line.split(" ")[0] == str(task)]
        given, solution = map(json.loads, lines[place + 1].split("->"))
        assert torch_task(str(task))(given).tolist() == solution


def test_help_reads_well(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("reproduce", "pretrain", "prefix", "eval", "generate", "tasks", "runs"):
        assert f"\n  {command} " in out
    assert max(map(len, out.splitlines())) <= 100


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["frob"], "No such command 'frob'"),
        (["reproduce", "--preset", "smok"], "did you mean 'smoke'"),
        (["reproduce", "Sort"], "unknown task 'Sort'"),
        (["reproduce", "--set", "trainer.max_iter=3"], "did you mean 'trainer.max_iters'?"),
        (["reproduce", "--set", "max_iters=3"], "did you mean 'trainer.max_iters' or 'prefix.max_iters'?"),
        (["reproduce", "--set", "max_iter=3"], "did you mean 'trainer.max_iters' or 'prefix.max_iters'?"),
        (["reproduce", "--set", "trainer.batch_size=abc"], "batch_size"),
        (["reproduce", "--set", "evaluation.n_matrix_rows=0", *TINY[:-2]], "n_matrix_rows"),
        (["reproduce", "--set", "trainer=3"], "is a group"),
        (["reproduce", "--set", "nothing"], "nothing"),
        (["reproduce", "--device", "gpu"], "gpu"),
        (["prefix"], "Missing argument 'TASK...'"),
        (["prefix", "LessThan+Modulo"], "LessThan"),
        (["prefix", "Sort"], "unknown task 'Sort'"),
        (["prefix", "Add1", "--kind", "soft"], "'soft' is not one of"),
        (["generate", "1 2", "--run", "nowhere"], "no model in nowhere"),
        (["inspect", "nothing.safetensors"], "no checkpoint nothing.safetensors"),
        (["inspect", "."], "'.' is a directory"),
        (["eval", "--run", "nowhere"], "no model in nowhere"),
        (["runs", "--run", "nowhere"], "there is no folder nowhere"),
        (["report", "--run", "nowhere"], "there is no run nowhere"),
        (["report", "--study", "nowhere"], "no results.csv in nowhere; 'mingpt sweep nowhere.toml' makes it"),
        (["lab", "--study", "nowhere"], "no results.csv in nowhere"),
        (["sweep", "none.toml"], "there is no file none.toml; expected a study's TOML file, or the word status"),
        (["sweep", "."], "there is no file .; expected a study's TOML file"),
        (["predict", "none.jsonl", "out.jsonl", "--task", "Add1"], "'none.jsonl' does not exist"),
        (["chain", "none.jsonl", "out.jsonl", "--task", "Add1"], "'none.jsonl' does not exist"),
        (["export", "exported", "--run", "nowhere"], "no model in nowhere"),
        (["analyze", "nowhere", "nowhere", "--text", "none.txt"], "there is no nowhere; expected MODEL and ADAPTER"),
        (["analyze", ".", "nowhere", "--text", __file__], "there is no nowhere; expected MODEL and ADAPTER"),
        (["analyze", ".", ".", "--text", "none.txt"], "there is no none.txt; expected MODEL and ADAPTER"),
        *(
            (command, f"{__file__}/x cannot be: {__file__} is a file, and no folder")
            for command in (
                ["prefix", "Add1", "--run", f"{__file__}/x"],
                ["predict", __file__, f"{__file__}/x", "--task", "Add1"],
                ["export", f"{__file__}/x"],
                ["report", "--out", f"{__file__}/x"],
            )
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("run: ")]
    assert message in line
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_damaged_file_is_one_line(run, folder, tmp_path):
    damaged = tmp_path / "model.safetensors"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    code, _, err = run("eval", "--run", tmp_path)
    assert code == 2
    assert "model.safetensors: field 'checksum'" in err
    assert len(err.splitlines()) == 1


def test_an_error_of_the_system_is_told_without_its_number(run, folder, monkeypatch):
    def from_regex(*_):
        raise FileNotFoundError(2, "No such file or directory", "some/file")

    monkeypatch.setattr(constraints.DFA, "from_regex", from_regex)
    assert run("generate", "--run", folder, "--regex", "1", ROW)[2] == "error: No such file or directory: 'some/file'\n"


def test_an_error_of_several_lines_is_one_line(run, folder, monkeypatch):
    def from_regex(*_):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(constraints.DFA, "from_regex", from_regex)
    assert run("generate", "--run", folder, "--regex", "1", ROW)[2] == "error: first second\n"


def test_an_interruption_says_what_holds(run, tmp_path, monkeypatch):
    def pretrain(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "pretrain", pretrain)
    code, out, err = run("pretrain", "--run", tmp_path / "new", *TINY)
    assert (code, out) == (130, "")
    assert err.strip() == "interrupted; what was saved is kept, and the same command goes on from it"


def test_only_the_main_process_prints_a_mistake_and_none_waits_for_another(tmp_path):
    job = {"PYTHONPATH": str(Path(mingpt.__file__).parents[1]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    errors = []
    for rank in ("0", "1"):  # one after the other
        environment = os.environ | job | {"MASTER_PORT": "29731", "RANK": rank}
        command = [sys.executable, "-m", "mingpt", "prefix", "Sort"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (2, "")
        errors.append(done.stderr)
    assert errors[0].startswith("error: unknown task 'Sort'")
    assert errors[1] == ""


def test_the_main_process_prints_what_failed_on_another(run, tmp_path, monkeypatch):
    def pretrain(*_):
        raise distributed.OtherProcessError("process 1 failed: ValueError: too few rows")

    monkeypatch.setattr(pipeline, "pretrain", pretrain)
    code, _, err = run("pretrain", "--run", tmp_path / "new", *TINY)
    assert (code, err) == (2, "error: process 1 failed: ValueError: too few rows\n")


def test_torchrun_leaves_the_options_after_two_dashes_alone(run, folder):
    arguments = ["--nproc-per-node", "2", "-m", "mingpt", "--", "config", "--run", str(folder)]
    parsed = torch.distributed.run.parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "mingpt")
    code, out, err = run(*parsed.training_script_args)
    assert (code, err) == (0, "")
    assert "n_embd: 8" in out
