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
from mingpt.distributed import process_group, sharding
from mingpt.experiments.pipeline import build_model
from mingpt.experiments.presets import get_default_config

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
    assert sharding.full_tensor(tensor).tolist() == sharding.distribute_like(tensor, torch.zeros(2)).tolist() == [1, 1]
    with pytest.raises(KeyError, match="x"):
        distributed.run_on_main(lambda: {}["x"])


@pytest.mark.parametrize(("who", "n_processes"), [(0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("function", ["run_on_main", "map_over_ranks"])
def test_an_error_on_one_process_is_raised_on_all(tmp_path, function, who, n_processes):
    """Each process catches what it gets, meets the others once more, and goes on."""
    expected = []
    for process in range(n_processes):
        fails = who == process
        if function == "run_on_main" and who:  # nobody else's function is called
            expected.append([None, ["fine"] * n_processes])
            continue
        text = "ValueError: no digit" if fails else f"OtherProcessError: process {who} failed: ValueError: no digit"
        expected.append([text, ["fine"] * n_processes])
    assert run_job("catch_errors", n_processes, tmp_path, function=function, who=who) == expected


def test_a_failed_job_of_one_process_raises_its_own_error():
    with pytest.raises(KeyError, match="x"):
        distributed.map_over_ranks({"a": lambda: 1, "b": lambda: {}["x"]})


@pytest.fixture
def machine(monkeypatch):
    """A machine with any number of GPUs, as torchrun's processes of number ``local_rank`` see it."""

    def make(n_gpus, local_rank=None, n_local=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.append(str(device)))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(process_group.dist, "init_process_group", lambda kind, timeout: joined.append(kind))
        monkeypatch.setattr(process_group.atexit, "register", lambda _: None)
        monkeypatch.setattr(process_group, "_start_heartbeat", lambda: None)
        if local_rank is not None:
            settings = {"RANK": 5, "WORLD_SIZE": 8, "MASTER_ADDR": "here", "LOCAL_RANK": local_rank}
            for name, value in {**settings, "LOCAL_WORLD_SIZE": n_local}.items():
                monkeypatch.setenv(name, str(value))
        return joined

    joined = []
    return make


@pytest.mark.parametrize(
    ("n_gpus", "local_rank", "device", "expected"),
    [
        (0, None, "auto", "cpu"),
        (0, 1, "auto", "cpu"),
        (1, None, "auto", "cuda:0"),
        (1, 1, "auto", "cuda:0"),
        (2, 1, "auto", "cuda:1"),
        (2, 5, "cuda", "cuda:1"),
        (2, 1, "cuda:0", "cuda:0"),
        (2, 1, torch.device("cuda"), "cuda:1"),
        (2, 1, "cpu", "cpu"),
        (0, None, torch.device("cpu"), "cpu"),
    ],
)
def test_one_function_says_the_device(machine, n_gpus, local_rank, device, expected):
    joined = machine(n_gpus, local_rank)
    assert distributed.resolve_device(device) == torch.device(expected)
    assert bool(joined) == (local_rank is not None)  # the process group comes first


@pytest.mark.parametrize(
    ("n_gpus", "device", "has"),
    [
        (0, "cuda", "cpu"),
        (0, torch.device("cuda", 0), "cpu"),
        (2, "cuda:2", "cpu, cuda:0, cuda:1"),
        (1, "gpu", "cpu, cuda:0"),
    ],
)
def test_a_device_that_the_machine_lacks_is_refused(machine, n_gpus, device, has):
    machine(n_gpus)
    with pytest.raises(ValueError, match=f"there is no device '{device}'; this machine has {has}; or give \"auto\""):
        distributed.resolve_device(device)


@pytest.mark.parametrize(
    ("n_gpus", "local_rank", "n_local", "expected"),
    [
        (0, 1, 2, ["gloo"]),
        (2, 1, 2, ["cuda:1", "cuda:nccl,cpu:gloo"]),
        (1, 1, 2, ["cuda:0", "gloo"]),
        (4, 6, 8, ["cuda:2", "gloo"]),
    ],
)
def test_processes_take_the_gpus_in_turn(machine, n_gpus, local_rank, n_local, expected):
    """Two processes on one GPU cannot use NCCL."""
    joined = machine(n_gpus, local_rank, n_local)
    distributed.init_process_group()
    assert joined == expected


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
    """One process trains; others find the model and the prefixes, and share the evaluation."""
    alone = run_job("evaluate", 1, tmp_path)
    (tmp_path / "run" / "results.json").unlink()
    together = run_job("evaluate", 3, tmp_path)
    assert together == alone * 3


@pytest.mark.slow
def test_torchrun_reproduces(tmp_path):
    sizes = {"model.n_embd": 8, "trainer.max_iters": 2, "prefix.max_iters": 2, "prefix.batch_size": 2}
    sizes |= {"evaluation.n_rows": 10, "evaluation.n_matrix_rows": 5}
    settings = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    command = [
        *TORCHRUN,
        "-m",
        "mingpt",
        "--",
        "reproduce",
        "--preset",
        "smoke",
        "--run",
        str(tmp_path / "run"),
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all seven mixed") == 1  # one process prints
    assert done.stdout.count("\nSortAscending+Add1 ") == 1
    assert done.stderr.count("pretraining") == 1
    assert "Warning" not in done.stderr
    assert (tmp_path / "run" / "figures" / "matrix.png").exists()


@pytest.mark.slow
def test_nothing_runs_any_more_when_the_interpreter_ends(tmp_path):
    """A thread of gloo that is left then aborts the process, now and then, after all is done."""
    script = tmp_path / "program.py"
    script.write_text(
        "import atexit\n"
        "from pathlib import Path\n"
        "def print_threads():\n"
        "    print(sorted(path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')))\n"
        "atexit.register(print_threads)\n"  # before all others, so it is called after them
        "from mingpt import distributed\n"
        "distributed.rank()\n"
        "import torch._dynamo\n"  # as torch does by itself, later than the group
        "distributed.all_gather(1)\n"
    )
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python") >= 2
    assert "gloo" not in done.stdout


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
    weights.save_model(tmp_path / "run" / "model.safetensors", model, cache_key={"data": data.describe()})
    for name in ("SortAscending", "Add1"):
        prefix = initial_prefix(model, 10, "random").detach()
        weights.save_prefix(tmp_path / "run" / "prefixes" / f"{name}.safetensors", prefix, model)
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(f"{row}\n" for row in data.rows(range(7))[0].tolist()))
    for number, words in enumerate(
        (["predict", "--task", "Add1", "--sample"], ["chain", "--task", "SortAscending+Add1", "--constrained"])
    ):
        outputs, printed = [], []
        for start in ([sys.executable], TORCHRUN):
            output = tmp_path / f"out{number}{len(outputs)}.jsonl"
            command = [*start, "-m", "mingpt", "--", words[0], str(rows), str(output), *words[1:]]
            command += ["--run", str(tmp_path / "run"), "--batch-size", "2"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            outputs.append(output.read_bytes())
            printed.append(done.stdout)
        assert outputs[0] == outputs[1]
        assert outputs[0].count(b"\n") == 7
        assert printed[0] == printed[1]
        assert not list(tmp_path.glob("*.steps"))
