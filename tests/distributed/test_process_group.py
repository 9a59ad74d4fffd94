"""Jobs of one process, and what must not depend on how many there are."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_script import run_job

from mingpt import distributed
from mingpt.distributed.process_group import sharding
from mingpt.experiments.pipeline import build_model
from mingpt.experiments.reproduction import get_default_config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def test_a_program_that_torchrun_did_not_start_is_a_job_of_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    assert distributed.run_on_main(lambda: [1]) == [1]
    assert distributed.all_gather("own") == ["own"]
    assert distributed.map_over_ranks({"b": lambda: 2, "a": lambda: 1}) == {"b": 2, "a": 1}
    assert list(distributed.map_over_ranks({"b": lambda: 2, "a": lambda: 1})) == ["b", "a"]
    tensor = torch.ones(2)
    assert distributed.all_reduce_sum(tensor) is tensor
    assert sharding.whole(tensor).tolist() == sharding.distribute_like(tensor, torch.zeros(2)).tolist() == [1, 1]
    with pytest.raises(KeyError, match="x"):
        distributed.run_on_main(lambda: {}["x"])


@pytest.mark.slow
@pytest.mark.parametrize(("who", "where"), [(0, "predict"), (1, "predict"), (0, "prompt")])
def test_an_exception_on_any_process_ends_all_of_them(tmp_path, who, where):
    """Prompts are made on the main process only, so nobody else's prompt function can fail."""
    script = Path(__file__).parents[1] / "distributed_script.py"
    arguments = f'{{"who": {who}, "where": "{where}"}}'
    command = [*TORCHRUN, str(script), "fail", str(tmp_path), arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert time.time() - float((tmp_path / "time").read_text()) < 10
    assert done.returncode == 1
    assert "ValueError: the ninth digit is missing" in done.stderr


@pytest.mark.slow
def test_a_runs_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    """One process trains; others find the model and the prefixes, and share out the evaluation."""
    alone = run_job("evaluate", 1, tmp_path)
    (tmp_path / "run" / "results.json").unlink()
    together = run_job("evaluate", 3, tmp_path)
    assert together == alone * 3


@pytest.mark.slow
def test_torchrun_reproduces(tmp_path):
    sizes = {"model.n_embd": 8, "trainer.max_iters": 2, "prefix.max_iters": 2, "prefix.batch_size": 2}
    sizes |= {"evaluation.n_rows": 10, "evaluation.n_matrix_rows": 5}
    settings = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    command = [*TORCHRUN, "-m", "mingpt", "reproduce", "--preset", "smoke", "--out", str(tmp_path / "run"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all seven mixed") == 1  # one process prints
    assert done.stdout.count("\nSortAscending+Add1 ") == 1
    assert done.stderr.count("pretraining") == 1
    assert "Warning" not in done.stderr
    assert (tmp_path / "run" / "figures" / "matrix.png").exists()


@pytest.mark.slow
def test_torchrun_predicts_what_one_process_predicts(tmp_path):
    from mingpt.datasets import CustomDataset
    from mingpt.prefix import initial_prefix
    from mingpt.storage import weights
    from mingpt.tasks import Add1, SortAscending

    config = get_default_config("smoke")
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    data = CustomDataset("test", [SortAscending(), Add1()], prefix_padding=10)
    weights.save_model(tmp_path / "model.safetensors", model, data=data.describe())
    prefixes = {name: initial_prefix(model, 10, "random").detach() for name in ("SortAscending", "Add1")}
    weights.save_prefixes(tmp_path / "prefixes.safetensors", prefixes, model)
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(f"{row}\n" for row in data.rows(range(7))[0].tolist()))
    for number, words in enumerate(
        (["predict", "--task", "Add1", "--sample"], ["chain", "--task", "SortAscending+Add1", "--constrained"])
    ):
        outputs, printed = [], []
        for start in ([sys.executable], TORCHRUN):
            output = tmp_path / f"out{number}{len(outputs)}.jsonl"
            command = [*start, "-m", "mingpt", words[0], str(rows), str(output), *words[1:]]
            command += ["--from", str(tmp_path), "--batch-size", "2"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            outputs.append(output.read_bytes())
            printed.append(done.stdout)
        assert outputs[0] == outputs[1]
        assert outputs[0].count(b"\n") == 7
        assert printed[0] == printed[1]
        assert not list(tmp_path.glob("*.steps"))
