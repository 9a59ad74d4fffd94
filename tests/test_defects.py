"""The weak points that a first fault injection found, each with the number that it was reported under."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torture.calls import new_trainer

from mingpt import cli
from mingpt.adapters import PrefixAdapter
from mingpt.data_tools import Add1, CustomDataset, SortAscending
from mingpt.experiments import multistep, pipeline
from mingpt.experiments.predictor import Predictor
from mingpt.experiments.presets import run_config
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage import (
    CheckpointError,
    LockedError,
    cached_json,
    load_checkpoint,
    load_model,
    load_prefix,
    locked,
    save_checkpoint,
    save_model,
    save_prefix,
)
from mingpt.storage.checkpoint import checksum
from mingpt.storage.files import read_json, write_atomic
from mingpt.trainer import AdapterTrainer, DivergedError, Trainer

SMALL = {"model_type": None, "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 13, "block_size": 9}


def new_model(**options):
    torch.manual_seed(0)
    config = GPT.get_default_config()
    config.merge_from_dict(SMALL | options)
    return GPT(config).eval()


def run_cli(monkeypatch, capsys, *arguments):
    """A command's exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["mingpt", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capsys.readouterr()


# ------------------------------------------------------------------------------------------- D1: NaN and infinity


def test_d1_a_diverging_training_stops_before_the_update_and_keeps_the_last_good_state(tmp_path):
    path = tmp_path / "state.safetensors"
    trainer = new_trainer(path)
    seen = {}

    def poison(trainer):
        seen["file"] = path.read_bytes()
        if trainer.iter_num == 1:  # two iterations are saved when the third is poisoned
            trainer.config.learning_rate = 1.0
            with torch.no_grad():
                trainer.model.transformer.wte.weight[3, 0] = math.inf

    trainer.add_callback("on_batch_end", lambda trainer: trainer.iter_num and poison(trainer))
    with pytest.raises(DivergedError, match=r"is trained is not finite.*lower learning_rate.*has an earlier state"):
        trainer.run()
    assert path.read_bytes() == seen["file"]
    assert load_checkpoint(path)[1]["state"]["iter_num"] == 1


def test_d1_nothing_is_updated_by_a_gradient_that_is_not_finite(tmp_path, monkeypatch):
    trainer, losses = new_trainer(tmp_path / "state.safetensors"), []
    compute = trainer.compute_loss

    def compute_loss(x, y):
        losses.append(compute(x, y))
        return losses[-1] * (math.inf if len(losses) == 3 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(DivergedError, match=r"at iteration 3.*its loss is inf"):
        trainer.run()
    saved, _ = load_checkpoint(tmp_path / "state.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved[f"trained.{name}"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [1, 2]


@pytest.mark.parametrize("rate", [1e25, 1e38])
def test_d1_one_of_several_adapters_diverges_and_the_others_are_none_the_worse(rate):
    model, config = new_model(), Trainer.get_default_config()
    config.merge_from_dict({"max_iters": 6, "batch_size": 4, "progress": False, "precision": "float32"})
    data = CustomDataset("train", [Add1()], length=4, prefix_padding=2)
    values = torch.randn(2, 1, 2, 8)

    def train(numbers, rates):
        adapter = PrefixAdapter(model, Prefix("activation", values[numbers].clone()))
        trainer = AdapterTrainer(config, model, [data] * len(numbers), adapter, rates)
        bad = pytest.raises(DivergedError, match=r"Add1 \(1\) at iteration") if len(numbers) > 1 else nullcontext()
        with bad:
            trainer.run()
        return trainer, adapter.prefix().values.detach()

    alone, expected = train([0], [0.1])
    both, found = train([0, 1], [0.1, rate])
    assert alone.is_diverged.tolist() == [False]
    assert both.is_diverged.tolist() == [False, True]
    assert both.n_iters[1] < 6
    torch.testing.assert_close(found[0], expected[0])
    assert torch.isfinite(found).all()


def test_d1_the_command_exits_with_1_and_writes_no_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rates = ["--set", "trainer.learning_rate=1e6", "--set", "trainer.muon_learning_rate=1e6"]
    code, printed = run_cli(monkeypatch, capsys, "reproduce", "--preset", "smoke", "--run", "run", *rates)
    assert code == 1
    assert "diverged at iteration" in printed.err
    assert "muon_learning_rate = 1000000.0" in printed.err
    assert "NaN" not in (tmp_path / "run" / "pretraining" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_d1_weights_that_are_not_finite_are_not_loaded(tmp_path, value):
    model = new_model()
    prefix = torch.zeros(1, 2, 8)
    save_prefix(tmp_path / "prefix.safetensors", prefix.fill_(value), model)
    with pytest.raises(CheckpointError, match=r"prefix\.safetensors: values holds NaN or infinity"):
        load_prefix(tmp_path / "prefix.safetensors", model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = value
    save_model(tmp_path / "model.safetensors", model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: transformer.h.0.mlp.c_fc.weight holds NaN"):
        load_model(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------ D3: two runs at once

HOLD = """
import sys, time
from mingpt.storage import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / ".lock"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_d3_a_second_run_says_who_holds_the_folder_and_exits_with_2(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, printed = run_cli(monkeypatch, capsys, "reproduce", "--preset", "smoke", "--run", "run")
    assert code == 2
    assert f"run is in use by process {holder.pid} on " in printed.err
    assert "--wait" in printed.err
    with pytest.raises(LockedError, match=str(holder.pid)):
        pipeline.pretrain(run_config("run", "smoke"), "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_d3_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with locked(tmp_path / "run" / ".lock"), locked(tmp_path / "run" / ".lock"):  # its own is no obstacle
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_d3_waiting_ends_when_the_owner_does(tmp_path, holder, capsys):
    killer = subprocess.Popen(["bash", "-c", f"sleep 1; kill -9 {holder.pid}"])
    start = time.monotonic()
    with locked(tmp_path / "run" / ".lock", wait=True):
        assert time.monotonic() - start > 0.5
    assert f"waiting for process {holder.pid}" in capsys.readouterr().err
    killer.wait()


# -------------------------------------------------------------------------------------- D4, D9, D11: what is left


def test_d4_data_without_its_identity_is_not_taken_for_an_answer(tmp_path):
    """As a kill leaves it that comes while the folder of a finished run is removed."""
    path, calls = tmp_path / "out.jsonl", []

    def stop(batch, _):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 10 * batch

    with pytest.raises(KeyboardInterrupt):
        Predictor(torch.tensor, stop).predict([1, 2, 3, 4], 2, path=path)
    (tmp_path / "out.jsonl.parts" / "cache_key.json").unlink()
    assert Predictor(torch.tensor, lambda batch, _: batch).predict([5, 6, 7, 8], 2, path=path) == [5, 6, 7, 8]
    assert path.read_text() == "5\n6\n7\n8\n"
    assert list(tmp_path.iterdir()) == [path]


def test_d6_the_loss_of_a_finished_state_that_is_resumed_is_the_last_one(tmp_path):
    first, again = new_trainer(tmp_path / "state.safetensors"), new_trainer(tmp_path / "state.safetensors")
    first.run()
    again.run()
    assert again.iter_num == 4
    assert again.loss.item() == first.loss.item()
    assert math.isfinite(again.loss.item())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_d7_a_signal_is_obeyed_after_the_iteration_and_after_saving(tmp_path, number):
    obeyed = []
    before = signal.signal(number, lambda *_: obeyed.append(number))
    try:
        trainer = new_trainer(tmp_path / "state.safetensors")
        trainer.add_callback("on_batch_end", lambda trainer: trainer.iter_num == 1 and os.kill(os.getpid(), number))
        with pytest.raises(SystemExit, match=str(128 + number)):  # also where the handler lets the process live
            trainer.run()
    finally:
        signal.signal(number, before)
    assert (obeyed, trainer.iter_num) == ([number], 2)
    assert load_checkpoint(tmp_path / "state.safetensors")[1]["state"]["iter_num"] == 2
    whole, rest = new_trainer(tmp_path / "other" / "state.safetensors"), new_trainer(tmp_path / "state.safetensors")
    whole.run()
    rest.run()
    assert checksum(rest.trained_tensors()) == checksum(whole.trained_tensors())


def test_d7_a_second_signal_is_obeyed_at_once(tmp_path):
    trainer = new_trainer(tmp_path / "state.safetensors")
    trainer.add_callback("on_batch_end", lambda trainer: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.iter_num == 0


def test_d7_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = new_trainer(tmp_path / "state.safetensors")
        trainer.add_callback("on_batch_end", lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        trainer.run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.iter_num == 4


def test_d8_a_folder_that_is_deleted_while_training_is_not_made_again(tmp_path):
    trainer = new_trainer(tmp_path / "run" / "state.safetensors")
    trainer.add_callback("on_batch_end", lambda _: subprocess.run(["rm", "-rf", tmp_path / "run"], check=True))
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors: not written, since .*/run was removed or moved"):
        trainer.run()
    assert not (tmp_path / "run").exists()


def test_d9_a_step_that_was_cut_is_noticed(tmp_path):
    model = new_model(block_size=19)
    plan = multistep.Plan(model, [multistep.row_step("Add1", None, 5, 5)])
    rows = np.ones((60, 5), dtype=int).tolist()
    multistep.predict(plan, rows, folder=tmp_path)
    path = tmp_path / "Add1.json"
    content = json.loads(path.read_text())
    assert len(content["value"]) == 60
    path.write_text(json.dumps(content | {"value": content["value"][:40]}))
    with pytest.raises(CheckpointError, match=r"Add1\.json: field 'checksum'"):
        multistep.predict(plan, rows, folder=tmp_path)
    path.unlink()
    cached_json(path, content["cache_key"], lambda: content["value"][:40])  # a program with a bug
    with pytest.raises(CheckpointError, match=r"Add1\.json: 40 outputs of 60 examples"):
        multistep.predict(plan, rows, folder=tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": NaN}', '{"a": Infinity}', "[1]", "\0"]
)
def test_d9_json_is_checked_and_named(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"some\.json: damaged"):
        read_json(path)


def test_d9_a_large_json_file_is_not_read(tmp_path):
    path = tmp_path / "some.json"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(CheckpointError, match="at most 268435456 are read"):
        read_json(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "NaN"])
def test_d9_the_header_of_a_checkpoint_is_json_too(tmp_path, text):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"mingpt": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: damaged"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_d10_an_error_on_writing_names_the_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/some\.json'"):
        write_atomic(tmp_path / "some.json", b"x")
    assert not list(tmp_path.iterdir())


def test_d11_what_a_killed_process_has_left_is_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    mine, other = (f".{number}-1-{socket.gethostname()}.tmp" for number in (os.getpid(), process.pid))
    (tmp_path / "folder").mkdir()
    for name in (mine, other):
        (tmp_path / "folder" / name).touch()
    write_atomic(tmp_path / "folder" / "file", b"x")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {mine, "file"}


# ----------------------------------------------------------------------------------------------- D12: hostile files


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**7, "n_head": 1},
        {"vocab_size": 10**12},
        {"block_size": 10**12},
        {"block_size": 10**7},  # 320 MB, which a machine has
    ],
)
def test_d12_a_sealed_model_of_a_hostile_size_takes_no_memory(tmp_path, change):
    model = new_model()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model.state_dict(), {"kind": "model", "config": model.config.to_dict() | change})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("field", ["length", "num_digits", "prefix_padding"])
def test_d12_a_sealed_description_of_hostile_data_takes_no_memory(tmp_path, field):
    model, data = new_model(), CustomDataset("train", [SortAscending()], length=4, prefix_padding=2).describe()
    for value in (10**12, None, "x", -1):
        path = tmp_path / "model.safetensors"
        save_model(path, model, cache_key={"data": data | {field: value}})
        with pytest.raises(CheckpointError, match=r"model\.safetensors: it does not hold"):
            pipeline.load_run(tmp_path)


def test_d12_a_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"


def test_d12_a_long_line_is_not_echoed_whole(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("[" + "1, " * 10**6 + "1]")
    with pytest.raises(ValueError, match="line 1 of ") as raised:
        cli.answers.read_rows(path, Add1(), 10, 13)
    assert len(str(raised.value)) < 500


def test_a_process_that_stops_is_named_by_the_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "from mingpt import distributed\n"
        "from mingpt.distributed import process_group\n"
        "process_group.SILENCE_S = 2.0\n"
        "if distributed.rank() == 1:\n"
        "    pid = os.getpid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1); os.kill(pid, signal.SIGSTOP); time.sleep(5)\n"
        "        os.kill(pid, signal.SIGCONT); os._exit(0)\n"
        "for number in range(40):\n"
        "    distributed.all_gather(number); time.sleep(0.05)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "process 1 has given no sign of life for 2.0 s; it is waited for up to MINGPT_TIMEOUT_S" in result.stderr


def test_d7_a_signal_in_native_code_is_still_a_signal(monkeypatch, capsys):
    """safetensors swallows the exception of a handler, and says that the file is damaged."""
    from mingpt import cli

    def load(*args, **kwargs):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("damaged")

    monkeypatch.setattr(cli.group, "cli", load)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as error:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert error.value.code == 143
    assert "damaged" not in capsys.readouterr().err
