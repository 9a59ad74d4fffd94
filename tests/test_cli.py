"""The command line: what it prints, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mingpt import cli
from mingpt.tasks import SIMPLE_TASKS, Task

TINY = [
    *("--preset", "smoke", "--set", "model.n_embd=8", "--set", "trainer.max_iters=2", "--set", "prefix.max_iters=2"),
    *("--set", "prefix.batch_size=2", "--set", "evaluation.n_rows=10", "--set", "evaluation.n_matrix_rows=5"),
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; returns its exit code, what it printed and what it complained."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mingpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "mingpt", "reproduce", "--out", str(out), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SortAscending+Add1" in done.stdout
    assert "Warning" not in done.stderr
    return out


def test_the_same_command_again_says_that_it_is_done(run, folder):
    code, out, _ = run("reproduce", "--out", folder, *TINY)
    assert code == 0
    assert "all seven mixed" in out


def test_generate_answers_a_row(run, folder):
    row = "6 2 7 6 7 5 3 6 6 10"
    code, out, _ = run("generate", "--from", folder, "--task", "Add1", row)
    assert code == 0
    assert len(out.split()) == 10
    assert all(0 <= int(word) < 13 for word in out.split())
    assert run("generate", "--from", folder, "--sample", "--seed", 3, row) == run(
        "generate", "--from", folder, "--sample", "--seed", 3, row
    )


def test_eval_scores_the_named_tasks_or_all(run, folder):
    code, out, _ = run("eval", "--from", folder, "--rows", 10, "Add1", "SortAscending+Add1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["Add1", "SortAscending+Add1"]
    assert len(run("eval", "--from", folder, "--rows", 3)[1].splitlines()) == 16
    assert "/3 = " in run("eval", "--from", folder, "--rows", 3, "--without-prefix", "Add1")[1]


ROWS = [[6, 2, 7, 6, 7, 5, 3, 6, 6, 10], [1, 1, 2, 3, 5, 8, 1, 2, 3, 4], [4] * 10]


@pytest.fixture
def files(tmp_path):
    """A file of rows, and one that is not there yet."""
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(f"{row}\n" for row in ROWS))
    return rows, tmp_path / "out.jsonl"


def test_predict_answers_each_row_of_a_file_as_generate_does(run, folder, files):
    _, output = files
    assert run("predict", *files, "--from", folder, "--task", "Add1", "--batch-size", 2)[0] == 0
    for row, line in zip(ROWS, output.read_text().splitlines(), strict=True):
        _, out, _ = run("generate", "--from", folder, "--task", "Add1", " ".join(map(str, row)))
        assert json.loads(line) == [int(word) for word in out.split()]
    assert list(output.parent.glob("out*")) == [output]
    before = output.read_bytes()
    code, _, err = run("predict", *files, "--from", folder, "--task", "Modulo")
    assert code == 2
    assert err.startswith(f"error: {output} exists; remove it or choose another file")
    assert len(err.splitlines()) == 1
    assert output.read_bytes() == before


def test_chain_answers_in_steps_and_measures_each(run, folder, files):
    _, output = files
    code, out, err = run("chain", *files, "--from", folder, "--task", "SortAscending+Add1", "--constrained")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["test-1-SortAscending_accuracy", "test-2-Add1_accuracy"]
    for row, line in zip(ROWS, output.read_text().splitlines(), strict=True):
        answers = json.loads(line)
        assert list(answers) == ["1-SortAscending", "2-Add1"]
        assert sorted(answers["1-SortAscending"]) == sorted(row)
        assert all(2 <= value <= 11 for value in answers["2-Add1"])
    assert list(output.parent.glob("out*")) == [output]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT and transformers among themselves
def test_export_writes_what_transformers_and_peft_read(run, folder, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    out = tmp_path / "exported"
    code, printed, err = run("export", out, "--from", folder, "--task", "Add1", "--task", "SortAscending+Add1")
    assert code == 0, err
    assert len(printed.splitlines()) == 2
    assert sorted(path.name for path in out.iterdir()) == ["Add1", "SortAscending+Add1", "model"]
    model = transformers.GPT2LMHeadModel.from_pretrained(out / "model")
    loaded = peft.PeftModel.from_pretrained(model, str(out / "Add1")).eval()
    row = torch.tensor(ROWS[:1])
    tokens = loaded.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False)
    _, expected, _ = run("generate", "--from", folder, "--task", "Add1", " ".join(map(str, ROWS[0])))
    assert tokens[0, 10:].tolist() == [int(word) for word in expected.split()]
    assert run("export", out, "--from", folder)[0] == 2


@pytest.mark.parametrize("line", ["[1, 2]", "6 2 7", "[" + "99, " * 9 + "1]", "[" + "1.5, " * 9 + "1]", '{"a": 1}', ""])
def test_a_line_that_is_no_row_is_named(run, folder, files, line):
    rows, output = files
    rows.write_text(f"{ROWS[0]}\n{line}\n")
    code, _, err = run("predict", *files, "--from", folder, "--task", "Add1")
    assert code == 2
    assert f"line 2 of {rows} must be a JSON list of 10 integers from 0 to 12, got {line!r}" in err
    assert len(err.splitlines()) == 1
    assert list(output.parent.glob("out*")) == []


def test_prefix_learns_one_more(run, folder):
    code, out, _ = run("prefix", "Add1+Add1", "--out", folder, *TINY)
    assert code == 0
    assert (folder / "prefix_Add1+Add1.safetensors").exists()
    assert out.startswith("Add1+Add1")


def test_inspect_says_what_a_file_is(run, folder):
    code, out, _ = run("inspect", folder / "prefixes.safetensors")
    assert code == 0
    assert '"kind": "prefixes"' in out
    assert "(2, 10, 8)" in out


def test_tasks_lists_each_with_a_right_sample(run):
    code, out, _ = run("tasks")
    assert code == 0
    lines = out.splitlines()
    for task in SIMPLE_TASKS:
        (place,) = [i for i, line in enumerate(lines) if line.split(" ")[0] == str(task)]
        given, solution = ([int(word) for word in side.split()] for side in lines[place + 1].split("->"))
        assert Task.parse(str(task))(given) == solution


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'"),
        (["reproduce", "--preset", "smok"], "did you mean 'smoke'"),
        (["reproduce", "--set", "trainer.max_iter=3"], "did you mean 'max_iters'"),
        (["reproduce", "--set", "trainer=3"], "is a group"),
        (["reproduce", "--set", "nothing"], "--key=value"),
        (["prefix"], "Missing argument 'TASK...'"),
        (["prefix", "LessThan+Modulo"], "LessThan"),
        (["prefix", "Sort"], "unknown task 'Sort'"),
        (["generate", "1 2", "--from", "nowhere"], "no model in nowhere"),
        (["inspect", "nothing.safetensors"], "no checkpoint nothing.safetensors"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("row", "message"),
    [("1 2 3", "rows of 10 integers"), ("a b c d e f g h i j", "integers with spaces"), ("99 " * 10, "from 0 to 12")],
)
def test_a_row_that_the_model_cannot_read_is_refused(run, folder, row, message):
    code, _, err = run("generate", "--from", folder, row)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) <= 2  # the model's size is logged first


ROW = "6 2 7 6 7 5 3 6 6 10"


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
    code, out, _ = run("generate", "--from", folder, *options, ROW)
    assert code == 0
    answer = list(map(int, out.split()))
    assert len(answer) == 10
    assert is_right(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "(1 2"], "the regular expression '(1 2' does not parse"),
        (["--regex", "1 13"], "'13', which is no token: they go from 0 to 12"),
        (["--regex", "(1 2 3)*"], "accepts nothing of 10 tokens; what it accepts has 0, 3, 6, 9, 12, 15, ... tokens"),
        (["--constraint", "short"], "'short' is not one of"),
        (["--regex", "11 .*", "--constraint", "permutation"], "nothing may follow in row 0 at step 0"),
    ],
)
def test_a_constraint_that_nothing_satisfies_is_refused(run, folder, options, message):
    code, out, err = run("generate", "--from", folder, *options, ROW)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) <= 2


def test_a_task_without_a_prefix_is_refused(run, folder):
    code, _, err = run("generate", "--from", folder, "--task", "Add1+Add1+Add1", "1 2 3 4 5 6 7 8 9 10")
    assert code == 2
    assert "no prefix for Add1+Add1+Add1" in err


def test_a_damaged_file_is_one_line(run, folder, tmp_path):
    damaged = tmp_path / "model.safetensors"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    code, _, err = run("eval", "--from", tmp_path)
    assert code == 2
    assert "model.safetensors: field 'checksum'" in err


def test_help_reads_well(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("reproduce", "pretrain", "prefix", "eval", "generate", "tasks"):
        assert f"\n  {command} " in out
    assert max(map(len, out.splitlines())) <= 100
