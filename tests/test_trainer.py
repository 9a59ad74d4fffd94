"""The training loop: minGPT's behaviour, exact resumption, and prefixes trained together as if alone."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import resume_script
import torch
from torch import nn

from mingpt import distributed, tasks
from mingpt.adapters import Reparametrization
from mingpt.datasets import CustomDataset
from mingpt.evaluation import evaluate
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage import checkpoint
from mingpt.storage.checkpoint import CheckpointError
from mingpt.trainer import AdapterTrainer, PrefixTrainer, Trainer, batch_end_callback, check_config
from mingpt.utils import CfgNode, set_seed

LENGTH, NUM_DIGITS, PADDING = 4, 6, 3
TORTURE_SEED = int(os.environ.get("TORTURE_SEED", "0"))
"""Decides when runs are killed. A failing test prints it; set another one to try other moments."""

THREE_TASKS = (tasks.SortAscending(), tasks.InverseBinary(), tasks.Add1())


def new_dataset(*its_tasks, **options):
    options = {"length": LENGTH, "num_digits": NUM_DIGITS, "prefix_padding": PADDING} | options
    return CustomDataset("train", list(its_tasks or [tasks.SortAscending()]), **options)


def new_model(seed=0, n_layer=2, n_embd=16, gain=1.0, **options):
    config = GPT.get_default_config()
    config.model_type = None
    config.merge_from_dict({"n_layer": n_layer, "n_head": 2, "n_embd": n_embd})
    config.vocab_size, config.block_size = NUM_DIGITS + 3, PADDING + 2 * LENGTH - 1
    config.merge_from_dict(options)
    set_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= gain  # at GPT-2's initialisation a small model hardly reacts to anything
    return model


def new_config(**options):
    config = Trainer.get_default_config()
    config.device, config.precision, config.max_iters, config.batch_size = "cpu", "float32", 5, 8
    config.merge_from_dict(options)
    return config


class Stopped(Exception):
    """What a callback of the tests stops a run with."""


def raise_at(iteration, error=Stopped):
    """A callback that raises at an iteration."""

    def callback(trainer):
        if trainer.iter_num == iteration:
            raise error

    return callback


def bytes_of(module):
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


# -------------------------------------------------------------------------------------------------- resumption


class Launcher:
    """Runs ``resume_script.train`` in processes that can be killed."""

    def __init__(self):
        self.script = subprocess.Popen(
            [sys.executable, resume_script.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, **arguments):
        self.script.stdin.write(json.dumps(arguments, default=str) + "\n")
        self.script.stdin.flush()
        return int(self.script.stdout.readline())

    def finish(self):
        return os.waitstatus_to_exitcode(int(self.script.stdout.readline()))

    def run(self, **arguments):
        self.start(**arguments)
        assert self.finish() == 0

    def run_and_kill(self, moment, delay, **arguments):
        """Kill a run ``delay`` seconds after it is seen to have done ``moment`` more iterations."""
        path = Path(arguments["folder"], "progress.jsonl")
        n_before = n_lines(path)
        process = self.start(**arguments, is_to_be_killed=True)
        deadline = time.monotonic() + 60
        while n_lines(path) - n_before < moment and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        assert self.finish() == -signal.SIGKILL


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.script.kill()  # at its own pace, Python takes a second to leave
    launcher.script.communicate()


@pytest.fixture(scope="module")
def uninterrupted(launcher, tmp_path_factory):
    """The folder of each kind's run that nothing happened to."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"uninterrupted_{kind}")
            launcher.run(kind=kind, folder=folders[kind], seed=0)
        return folders[kind]

    return folder_of


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(folder):
    """What came out of a run, and what each of its iterations saw, however often it was done."""
    iterations = {}
    for line in read_lines(folder / "progress.jsonl"):
        seen = iterations.setdefault(line["iter"], line)
        assert seen == line, "an iteration that was done again was another one"
    assert list(iterations) == list(range(resume_script.N_ITERS))
    metrics = read_lines(folder / "metrics.jsonl")
    for line in metrics:
        assert line.pop("iter_dt") > 0
    return {"iterations": iterations, "metrics": metrics} | json.loads((folder / "result.json").read_text())


def check_same_result(folder, reference):
    found, expected = result_of(folder), result_of(reference)
    logged = [i for i in range(1, resume_script.N_ITERS + 1) if i % resume_script.LOG_EVERY == 0]
    logged += [resume_script.N_ITERS] * (resume_script.N_ITERS % resume_script.LOG_EVERY > 0)
    assert [line["iter"] for line in expected["metrics"]] == logged
    different = {name for name in expected if found[name] != expected[name]}
    assert not different


@pytest.mark.parametrize("case", ["early", "middle", "late", "twice"])
@pytest.mark.parametrize("kind", resume_script.KINDS)
def test_a_killed_run_resumes_bit_identically(launcher, uninterrupted, tmp_path, kind, case):
    """Killed at a drawn time after the first checkpoint, in a third of the run or in both halves of it."""
    n_kills = 2 if case == "twice" else 1
    n_parts, part = (2, 0) if case == "twice" else (3, ["early", "middle", "late"].index(case))
    print(f"TORTURE_SEED={TORTURE_SEED}")
    rng = random.Random(f"{TORTURE_SEED} {kind} {case}")
    size = (resume_script.LAST_KILL - resume_script.CHECKPOINT_EVERY) // n_parts
    for number in range(n_kills):
        before = resume_script.CHECKPOINT_EVERY + part * size if number == 0 else 0
        moment = before + 1 + rng.randrange(size)
        launcher.run_and_kill(moment, rng.uniform(0, 0.02), kind=kind, folder=tmp_path, seed=number)
        assert (tmp_path / "run.safetensors").exists()
    launcher.run(kind=kind, folder=tmp_path, seed=n_kills)
    check_same_result(tmp_path, uninterrupted(kind))


@pytest.mark.parametrize("kind", [kind for kind in resume_script.KINDS if kind != "plateau"])
def test_the_number_of_workers_does_not_matter(launcher, uninterrupted, tmp_path, kind):
    moment = resume_script.CHECKPOINT_EVERY + 2
    launcher.run_and_kill(moment, 0.001, kind=kind, folder=tmp_path, seed=0, num_workers=2)
    launcher.run(kind=kind, folder=tmp_path, seed=1, num_workers=2)
    check_same_result(tmp_path, uninterrupted(kind))


def test_the_reference_run_is_worth_comparing_with(uninterrupted):
    ends = checkpoint.load_checkpoint(uninterrupted("plateau") / "run.safetensors")[0]["trained.n_iters"].tolist()
    assert min(ends) < max(ends) == resume_script.N_ITERS  # one prefix ended at its plateau
    for kind in resume_script.KINDS:
        result = result_of(uninterrupted(kind))
        iterations = result["iterations"].values()
        assert len({line["data"] for line in iterations}) == resume_script.N_ITERS
        assert len({line["loss"] for line in iterations}) > resume_script.N_ITERS // 2
        assert max(line["learning_rate"] for line in result["metrics"]) > 0


def trainer_with_checkpoint(folder, model=None, dataset=None, **options):
    path = str(folder / "run.safetensors")
    config = new_config(**({"checkpoint_path": path, "checkpoint_every": 2} | options))
    return Trainer(config, model or new_model(), dataset or new_dataset())


def test_a_finished_run_does_nothing_more(tmp_path):
    metrics = str(tmp_path / "metrics.jsonl")
    first = trainer_with_checkpoint(tmp_path, metrics_path=metrics, log_every=2)
    first.run()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model, calls = new_model(seed=1), []
    again = trainer_with_checkpoint(tmp_path, model, metrics_path=metrics, log_every=2)
    again.add_callback("on_batch_end", calls.append)
    again.run()
    assert not calls
    assert again.iter_num == 5
    assert torch.equal(again.loss, first.loss)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    saved, _ = checkpoint.load_checkpoint(again.config.checkpoint_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"trained.{name}"])


def test_a_run_without_a_checkpoint_file_starts_from_the_beginning(tmp_path):
    calls = []
    trainer = trainer_with_checkpoint(tmp_path)
    trainer.add_callback("on_batch_end", lambda trainer: calls.append(trainer.iter_num))
    trainer.run()
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_iters, expected", [(4, [2, 4]), (5, [2, 4, 5])])
def test_the_state_is_saved_once_at_an_iteration(tmp_path, monkeypatch, max_iters, expected):
    saved = []
    trainer = trainer_with_checkpoint(tmp_path, max_iters=max_iters)
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.iter_num))
    trainer.run()
    assert saved == expected


def test_buffers_are_resumed(tmp_path):
    """A BatchNorm's running mean is no parameter, and training changes it."""

    def train(stop):
        set_seed(0)
        model = Linear()
        model.layers.append(nn.BatchNorm1d(2))
        trainer = trainer_with_checkpoint(tmp_path / str(stop), model, Pairs())
        if stop:
            trainer.add_callback("on_batch_end", raise_at(3))
            with pytest.raises(Stopped):
                trainer.run()
            trainer = trainer_with_checkpoint(tmp_path / str(stop), model, Pairs())
            model.layers[-1].reset_running_stats()
        trainer.run()
        return bytes_of(model)

    assert train(False) == train(True)


@pytest.mark.parametrize(
    "options",
    [
        {"progress": False},
        {"checkpoint_every": 3},
        {"log_every": 1, "metrics_path": "metrics.jsonl"},
        {"num_workers": 2},
        {"device": torch.device("cpu")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_how_a_run_is_watched_may_change(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    trainer_with_checkpoint(tmp_path).run()
    trainer_with_checkpoint(tmp_path, **options).run()


class Linear(nn.Module):
    """Any module that a Trainer can train: no config, no prefix, no vocabulary."""

    def __init__(self, n_in=4, n_out=2, n_layers=1):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(n_in if not layer else n_out, n_out) for layer in range(n_layers)))

    def configure_optimizers(self, config):
        return torch.optim.AdamW(self.parameters(), lr=config.learning_rate)

    def forward(self, x, y=None):
        out = self.layers(x)
        return out, None if y is None else ((out - y) ** 2).mean()


class Pairs:
    """Any map-style dataset: not even a subclass of torch's."""

    def __init__(self, n=10, n_in=4, n_out=2):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, n_in, generator=generator)
        self.y = self.x[:, :n_out] * 2 + 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


@pytest.mark.parametrize(
    "field, change",
    [
        ("learning_rate", {"learning_rate": 1e-3}),
        ("batch_size", {"batch_size": 4}),
        ("optimizer", {"optimizer": "muon"}),
        ("lr_schedule", {"lr_schedule": "linear"}),
        ("betas", {"betas": (0.9, 0.99)}),
        ("max_iters", {"max_iters": 6}),
        ("precision", {"precision": "bfloat16"}),
        ("n_layer", {"model": {"n_layer": 1}}),
        ("n_embd", {"model": {"n_embd": 8}}),
        ("attn_pdrop", {"model": {"attn_pdrop": 0.0}}),
        ("tasks", {"data": {"its_tasks": (tasks.SortDescending(),)}}),
        ("seed", {"data": {"seed": 1}}),
        ("prefix_padding", {"data": {"prefix_padding": 2}}),
        ("num_digits", {"data": {"num_digits": 5}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, field, change):
    trainer_with_checkpoint(tmp_path, max_iters=2).run()
    before = (tmp_path / "run.safetensors").read_bytes()
    data = dict(change.pop("data", {}))
    dataset = new_dataset(*data.pop("its_tasks", ()), **data)
    model = new_model(seed=1, **change.pop("model", {}))
    weights = bytes_of(model)
    other = trainer_with_checkpoint(tmp_path, model, dataset, **({"max_iters": 2} | change))
    with pytest.raises(CheckpointError, match=rf"run\.safetensors.*{field}"):
        other.run()
    assert bytes_of(model) == weights
    assert (tmp_path / "run.safetensors").read_bytes() == before


def test_the_checkpoint_of_another_kind_of_trainer_is_refused(tmp_path):
    trainer_with_checkpoint(tmp_path).run()
    config = new_config(checkpoint_path=str(tmp_path / "run.safetensors"))
    other = PrefixTrainer(config, new_model(), new_dataset(), new_prefix())
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*trainer.*PrefixTrainer"):
        other.run()


@pytest.mark.parametrize(
    "saved, other",
    [({"n_layers": 1}, {"n_layers": 2}), ({"n_layers": 2}, {"n_layers": 1}), ({"n_out": 2}, {"n_out": 1})],
    ids=["missing", "unknown", "other shape"],
)
def test_the_checkpoint_of_another_module_is_refused(tmp_path, saved, other):
    """A module without a config is told apart by its tensors."""
    trainer_with_checkpoint(tmp_path, Linear(**saved), Pairs(n_out=saved.get("n_out", 2))).run()
    model = Linear(**other)
    weights = bytes_of(model)
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*layers\.[01]\."):
        trainer_with_checkpoint(tmp_path, model, Pairs(n_out=other.get("n_out", 2))).run()
    assert bytes_of(model) == weights


def test_the_checkpoint_of_a_run_on_another_map_style_dataset_is_refused(tmp_path):
    """Nothing is known about its contents, but which examples are drawn depends on how many there are."""
    trainer_with_checkpoint(tmp_path, Linear(), Pairs(n=10)).run()
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*data"):
        trainer_with_checkpoint(tmp_path, Linear(), Pairs(n=11)).run()


def test_a_prefix_checkpoint_of_another_kind_is_refused(tmp_path):
    """Every kind has other axes behind that of K, so the shape tells."""
    config = new_config(checkpoint_path=str(tmp_path / "run.safetensors"))
    values = torch.randn(1, PADDING, 16)
    PrefixTrainer(config, new_model(n_layer=1), new_dataset(), values.clone().requires_grad_()).run()
    other = PrefixTrainer(config, new_model(n_layer=1), new_dataset(), Prefix("prompt", values.requires_grad_()))
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*trained.values"):
        other.run()


def test_a_prefix_checkpoint_of_other_placeholders_is_refused(tmp_path):
    """Two positions in the place of three tokens: the content's positions are others."""
    config = new_config(checkpoint_path=str(tmp_path / "run.safetensors"))
    one = Prefix("activation", torch.randn(1, 2, 2, 16, requires_grad=True))
    PrefixTrainer(config, new_model(), new_dataset(), one).run()
    other = Prefix("activation", one.values.detach(), None, PADDING)
    other = PrefixTrainer(config, new_model(), new_dataset(), other)
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*n_placeholders"):
        other.run()


def test_a_prefix_checkpoint_for_other_weights_is_refused(tmp_path):
    """The frozen model is part of what a prefix is trained for, though not of its checkpoint."""
    config = new_config(checkpoint_path=str(tmp_path / "run.safetensors"))
    PrefixTrainer(config, new_model(), new_dataset(), new_prefix()).run()
    other = PrefixTrainer(config, new_model(seed=1), new_dataset(), new_prefix())
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*model"):
        other.run()


@pytest.mark.parametrize("other", [{"init": "random"}, {}, {"init": "padding", "model": [1, 2]}])
@pytest.mark.parametrize("is_prefix", [False, True])
def test_the_checkpoint_of_another_cache_key_is_refused(tmp_path, is_prefix, other):
    """What a caller knows of a run, such as what a prefix was initialised with, is part of its state's identity."""

    def trainer(cache_key):
        own = trainer_with_checkpoint(tmp_path)
        own = PrefixTrainer(own.config, own.model, own.train_dataset, new_prefix()) if is_prefix else own
        own.cache_key = cache_key
        return own

    trainer({"init": "padding", "sizes": (1, 2)}).run()
    with pytest.raises(CheckpointError, match=r"run\.safetensors.*(init|model|sizes)"):
        trainer(other).run()
    again = trainer({"init": "padding", "sizes": (1, 2)})  # a tuple here is a list in the file
    again.add_callback("on_batch_end", raise_at(0))
    again.run()


def test_a_state_without_a_cache_key_is_refused(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "run.safetensors", {}, {"trainer": "Trainer", "state": {"iter_num": 3}})
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        trainer_with_checkpoint(tmp_path).run()


def test_a_frozen_model_is_hashed_once_a_run(tmp_path, monkeypatch):
    hashed = []
    checksum = checkpoint.checksum
    monkeypatch.setattr(
        checkpoint, "checksum", lambda tensors, *header: hashed.append(header) or checksum(tensors, *header)
    )
    config = new_config(checkpoint_path=str(tmp_path / "run.safetensors"), checkpoint_every=1)
    trainer = PrefixTrainer(config, new_model(), new_dataset(), new_prefix())
    trainer.run()
    assert len([header for header in hashed if header]) == 5  # a file's own
    assert len([header for header in hashed if not header]) == 1


def test_a_damaged_checkpoint_stops_the_run_and_stays(tmp_path):
    trainer_with_checkpoint(tmp_path).run()
    path = tmp_path / "run.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        trainer_with_checkpoint(tmp_path).run()
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------- configurations


WRONG_VALUES = {
    "device": ["gpu", None],
    "num_workers": [-1, "2"],
    "max_iters": [-1, 10.5, "10"],
    "batch_size": [0, 8.5, "abc", True, None],
    "learning_rate": ["1e-3x", -1.0, None, float("nan"), True],
    "betas": [0.9, (0.9,), (0.9, 0.95, 0.99), ("0.9", 0.95), (0.9, 1.1), "(0.9, 0.95)"],
    "weight_decay": [-0.1, "none"],
    "grad_norm_clip": [-1.0, None],
    "optimizer": ["adam", None],
    "muon_learning_rate": ["fast"],
    "muon_momentum": [1.5],
    "lr_schedule": ["step"],
    "warmup_iters": [-1, 0.5],
    "decay_fraction": [1.1, "half"],
    "validate_every": [0, 1.5],
    "validation_rows": [0],
    "patience": [-1],
    "precision": ["float16"],
    "compile": ["false", None],
    "parallel": ["tp"],
    "checkpoint_every": [0, "4"],
    "log_every": [0, None],
    "progress": ["no"],
}


def test_every_key_but_paths_has_wrong_values():
    paths = {"checkpoint_path", "metrics_path", "tensorboard_path"}
    assert WRONG_VALUES.keys() | paths == Trainer.get_default_config().to_dict().keys()


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_is_refused_before_anything_moves(tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    model = new_model()
    monkeypatch.setattr(model, "to", lambda device: pytest.fail("the model was moved"))
    config = new_config(**({"checkpoint_path": "run.safetensors"} if key == "checkpoint_every" else {}) | {key: value})
    match = rf"^configuration key '{key}' (takes|must be) .*, got {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=f"^there is no device '{value}'" if key == "device" else match):
        Trainer(config, model, new_dataset())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"checkpoint_every": 2}, "checkpoint_every is set and checkpoint_path is not"),
        ({"lr_schedule": "cosine", "max_iters": None}, "lr_schedule = 'cosine' needs max_iters"),
        ({"parallel": "fsdp", "optimizer": "muon"}, "use adamw"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_values_that_contradict_each_other_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        check_config(new_config(**options))


def test_each_mistake_has_a_line():
    config = new_config(batch_size="abc", learning_rate=-1, optimizer="adam", checkpoint_every=2)
    with pytest.raises(ValueError, match="batch_size") as raised:
        check_config(config)
    lines = str(raised.value).splitlines()
    keys = ("batch_size", "learning_rate", "optimizer", "checkpoint_every")
    assert all(key in line for key, line in zip(keys, lines, strict=True))


def test_right_values_pass(tmp_path):
    check_config(Trainer.get_default_config())
    check_config(new_config(device=torch.device("cpu"), max_iters=None, betas=[0, 0.5], learning_rate=1, compile=True))
    check_config(new_config(progress=False, checkpoint_path=tmp_path, checkpoint_every=1))


def test_values_get_the_types_of_their_defaults():
    config = new_config(batch_size=8.0, betas=[0, 0.5], checkpoint_every=2.0, checkpoint_path="run.safetensors")
    check_config(config)
    assert [repr(value) for value in (config.batch_size, config.betas, config.checkpoint_every)] == [
        "8", "(0.0, 0.5)", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("n_datasets", [0, 1, 2])
@pytest.mark.parametrize("size", ["vocab_size", "block_size"])
def test_a_dataset_that_does_not_fit_the_model_is_refused(n_datasets, size):
    """For a Trainer, and for a PrefixTrainer of a list of datasets."""
    model = new_model(**{size: 8})
    prefixes = torch.randn(n_datasets, 2, PADDING, 16, requires_grad=True)
    arguments = ([new_dataset()] * n_datasets, prefixes) if n_datasets else (new_dataset(),)
    with pytest.raises(ValueError, match={"vocab_size": "vocabulary is 8", "block_size": "block size is 8"}[size]):
        (PrefixTrainer if n_datasets else Trainer)(new_config(), model, *arguments)


def test_the_device_is_asked_for_before_the_model_moves(monkeypatch):
    """It joins the other processes, which decides the GPU that the model goes to."""
    steps, model = [], new_model()
    resolve, to = distributed.resolve_device, model.to
    monkeypatch.setattr(distributed, "resolve_device", lambda device: steps.append(device) or resolve(device))
    monkeypatch.setattr(model, "to", lambda device: steps.append("moved") or to(device))
    trainer = Trainer(new_config(), model, new_dataset())
    assert steps[-1] == "moved"
    assert set(steps[:-1]) == {"cpu"}
    assert trainer.device == torch.device("cpu")


# -------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("tail", ['{"iter": 7', '{"iter": 7, "loss": 1.0}', "\n", ""])
def test_metrics_of_a_killed_run_are_mended(tmp_path, tail):
    """Whatever a kill leaves after the last checkpoint's line goes, and no line is glued to another."""
    metrics = tmp_path / "metrics.jsonl"
    options = {"max_iters": 6, "log_every": 1, "metrics_path": str(metrics)}

    trainer = trainer_with_checkpoint(tmp_path, **options)
    trainer.add_callback("on_batch_end", raise_at(5))
    with pytest.raises(Stopped):
        trainer.run()
    with metrics.open("a") as file:
        file.write(tail)
    trainer_with_checkpoint(tmp_path, **options).run()
    assert [line["iter"] for line in read_lines(metrics)] == [1, 2, 3, 4, 5, 6]


def test_metrics_say_what_happened(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    seen = []
    options = {"max_iters": 7, "log_every": 3, "learning_rate": 0.5, "lr_schedule": "linear", "decay_fraction": 1.0}
    trainer = Trainer(new_config(metrics_path=str(metrics), **options), new_model(), new_dataset())
    trainer.add_callback("on_batch_end", lambda t: seen.append((t.loss.item(), t.optimizer.param_groups[0]["lr"])))
    trainer.run()
    lines = read_lines(metrics)
    assert [line["iter"] for line in lines] == [3, 6, 7]
    assert [(line["loss"], line["learning_rate"]) for line in lines] == [seen[line["iter"] - 1] for line in lines]
    assert [rate for _, rate in seen] == pytest.approx([0.5 * (7 - i) / 7 for i in range(7)])


# ---------------------------------------------------------------------------------------- what minGPT's users know


def test_callbacks_are_set_and_added_in_order():
    calls = []
    trainer = Trainer(new_config(max_iters=2), new_model(), new_dataset())
    for name in "ab":
        trainer.add_callback("on_batch_end", lambda trainer, name=name: calls.append((name, trainer.iter_num)))
    trainer.run()
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    calls.clear()
    trainer.set_callback("on_batch_end", lambda trainer: calls.append(("c", trainer.iter_num)))
    trainer.add_callback("on_batch_end", lambda trainer: calls.append(("d", trainer.iter_num)))
    trainer.run()
    assert calls == [("c", 0), ("d", 0), ("c", 1), ("d", 1)]


def test_callbacks_see_the_loop():
    model, dataset = new_model(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0), new_dataset()
    x, y = dataset.batch(range(8))
    with torch.no_grad():
        first_loss = model(x, y)[1].item()
    iterations, losses, times = [], [], []

    def look(trainer):
        assert trainer.model is model
        assert trainer.loss.ndim == 0
        iterations.append(trainer.iter_num)
        losses.append(trainer.loss.item())
        times.append(trainer.iter_dt)

    trainer = Trainer(new_config(max_iters=4, learning_rate=0.01), model, dataset)
    trainer.set_callback("on_batch_end", look)
    started = time.perf_counter()
    trainer.run()
    elapsed = time.perf_counter() - started
    assert iterations == [0, 1, 2, 3]
    assert trainer.iter_num == 4
    assert losses[0] == pytest.approx(first_loss, rel=1e-6)
    assert losses[-1] < losses[0]
    assert all(dt > 0 for dt in [*times[1:], trainer.iter_dt])
    assert sum(times) + trainer.iter_dt <= elapsed


@pytest.mark.parametrize("max_iters", [0, 1, 3])
def test_max_iters_is_how_many_steps_there_are(max_iters):
    steps = []
    trainer = Trainer(new_config(max_iters=max_iters), new_model(), new_dataset())
    trainer.add_callback("on_batch_end", steps.append)
    trainer.run()
    assert len(steps) == trainer.iter_num == max_iters


def test_without_max_iters_only_an_exception_stops():
    trainer = Trainer(new_config(max_iters=None), Linear(), Pairs())
    trainer.add_callback("on_batch_end", raise_at(30))
    with pytest.raises(Stopped):
        trainer.run()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_module_learns_any_map_style_dataset(precision):
    set_seed(0)
    model = Linear()
    config = new_config(max_iters=300, learning_rate=0.05, precision=precision)
    trainer = Trainer(config, model, Pairs())
    trainer.run()
    assert trainer.loss.item() < (1e-3 if precision == "float32" else 1e-2)
    assert next(model.parameters()).dtype == torch.float32


def test_an_attribute_named_batch_is_no_method(tmp_path):
    """A dataset may keep its batch size under that name, and anything under ``describe``."""
    data, same = Pairs(), Pairs()
    data.batch, data.describe = 32, "pairs"
    states = []
    for dataset in (data, same):
        set_seed(1)
        model = Linear()
        trainer_with_checkpoint(tmp_path / str(len(states)), model, dataset).run()
        states.append(bytes_of(model))
    assert states[0] == states[1]


class Counter(nn.Module):
    """A language model that takes minGPT's two arguments and no more."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(NUM_DIGITS + 3, NUM_DIGITS + 3)

    def configure_optimizers(self, config):
        return torch.optim.AdamW(self.parameters(), lr=config.learning_rate)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("padding", [0, PADDING])
def test_any_module_learns_a_custom_dataset(padding):
    losses = []
    trainer = Trainer(new_config(max_iters=40, learning_rate=0.1), Counter(), new_dataset(prefix_padding=padding))
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_moves_and_none_without_a_step(optimizer):
    model = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(new_config(max_iters=0, optimizer=optimizer), model, new_dataset()).run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Trainer(new_config(max_iters=1, optimizer=optimizer), model, new_dataset()).run()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_draws_a_map_style_dataset_at_random_with_replacement():
    seen = []

    class Recorded(Pairs):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    def draws(seed):
        seen.clear()
        set_seed(seed)
        Trainer(new_config(max_iters=50), Linear(), Recorded()).run()
        return list(seen[:400])

    first = draws(1)
    assert draws(1) == first  # set_seed decides, as in minGPT
    assert draws(2) != first
    assert all(20 <= first.count(index) <= 65 for index in range(10))  # 40 expected, standard deviation 6
    assert any(len(set(first[start : start + 8])) < 8 for start in range(0, 400, 8))
    assert first[:8] != first[8:16]


def test_a_custom_dataset_is_walked_without_repetition():
    seen = []

    class Recorded(CustomDataset):
        def rows(self, indices):
            seen.extend(indices)
            return super().rows(indices)

    dataset = Recorded("train", [tasks.Add1()], length=LENGTH, num_digits=NUM_DIGITS, prefix_padding=PADDING, size=4)
    Trainer(new_config(max_iters=3), new_model(), dataset).run()
    assert seen[:24] == list(range(24))


def test_overrides_from_the_command_line():
    config = new_config()
    config.merge_from_args(["--max_iters=3", "--learning_rate=1e-2", "--betas=(0.8, 0.9)", "--optimizer=muon"])
    trainer = Trainer(config, new_model(), new_dataset())
    trainer.run()
    assert trainer.iter_num == 3
    assert trainer.optimizer.param_groups[-1]["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match="learning_rate"):
        config.merge_from_args(["--learning_rat=1e-2"])
    with pytest.warns(UserWarning, match="learning_rate"):
        config.learning_rat = 1e-2


def test_a_second_run_starts_over():
    """As in minGPT: the count and the optimizer are new, the weights are those that were reached."""
    iterations, optimizers = [], []
    model = new_model(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    trainer = Trainer(new_config(max_iters=3), model, new_dataset())
    trainer.add_callback("on_batch_end", lambda trainer: iterations.append(trainer.iter_num))
    trainer.run()
    optimizers.append(trainer.optimizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.run()
    optimizers.append(trainer.optimizer)
    assert iterations == [0, 1, 2, 0, 1, 2]
    assert optimizers[0] is not optimizers[1]
    assert all(state["step"] == 3 for state in optimizers[1].state.values())
    other = new_model(seed=1, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    other.load_state_dict(weights)
    Trainer(new_config(max_iters=3), other, new_dataset()).run()
    assert bytes_of(other) == bytes_of(model)


def test_the_same_seed_trains_the_same_model():
    def train(seed):
        model = new_model(seed)
        Trainer(new_config(), model, new_dataset()).run()
        return bytes_of(model)

    assert train(0) == train(0) != train(1)


def test_it_trains_in_training_mode_and_prefixes_in_evaluation_mode():
    modes = []
    model = new_model().eval()
    for trainer in (
        Trainer(new_config(max_iters=1), model, new_dataset()),
        PrefixTrainer(new_config(max_iters=1), model, new_dataset(), new_prefix()),
    ):
        trainer.add_callback("on_batch_end", lambda trainer: modes.append(trainer.model.training))
        trainer.run()
    assert modes == [True, False]


def test_gradients_are_clipped():
    norms = []

    def look(trainer):
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())

    for clip in (1e9, 1e-3):
        trainer = Trainer(new_config(max_iters=1, grad_norm_clip=clip), new_model(), new_dataset())
        trainer.add_callback("on_batch_end", look)
        trainer.run()
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_learning_rate_reaches_every_group(optimizer):
    """Warm-up from 1/3, plateau, and a decay that ends one step after zero would be reached."""
    options = {"max_iters": 6, "warmup_iters": 2, "lr_schedule": "linear", "decay_fraction": 0.5}
    config = new_config(optimizer=optimizer, learning_rate=0.01, muon_learning_rate=0.02, **options)
    rates = []
    trainer = Trainer(config, new_model(), new_dataset())
    trainer.add_callback("on_batch_end", lambda t: rates.append([group["lr"] for group in t.optimizer.param_groups]))
    trainer.run()
    peaks = [0.02, 0.01, 0.01] if optimizer == "muon" else [0.01, 0.01]
    for step, factor in zip(rates, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], strict=True):
        assert step == pytest.approx([factor * peak for peak in peaks])


def test_a_small_model_learns_to_sort():
    dataset = CustomDataset("train", [tasks.SortAscending()], length=3, num_digits=10)
    config = GPT.get_default_config()
    config.model_type = None
    config.merge_from_dict({"n_layer": 2, "n_head": 4, "n_embd": 32})
    config.vocab_size, config.block_size = dataset.get_vocab_size(), dataset.get_block_size()
    config.embd_pdrop = config.resid_pdrop = config.attn_pdrop = 0.0
    set_seed(0)
    model = GPT(config)
    losses = []
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "lr_schedule": "linear"}
    train_config = new_config(max_iters=120, batch_size=64, optimizer="muon", **rates)
    trainer = Trainer(train_config, model, dataset)
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    test_set = CustomDataset("test", [tasks.SortAscending()], length=3, num_digits=10)
    assert evaluate(model, test_set, n_rows=300).accuracy < 0.2
    trainer.run()
    assert losses[0] > 1.5
    assert losses[-1] < 0.2
    assert evaluate(model, test_set, n_rows=300).accuracy > 0.9


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_shared_padding_does_not_change_the_loss(n_tasks):
    """The padding is computed once a batch; the loss and every gradient are those of computing it in each row."""
    model = new_model(gain=5.0, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    dataset = new_dataset(*THREE_TASKS[:n_tasks])
    x, y = dataset.batch(range(8))
    _, loss = model(x, y)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    seen = {}

    def look(trainer):
        seen.update((name, parameter.grad.clone()) for name, parameter in model.named_parameters())

    trainer = Trainer(new_config(max_iters=1, grad_norm_clip=1e9), model, dataset)
    trainer.add_callback("on_batch_end", look)
    trainer.run()
    assert trainer.loss.item() == pytest.approx(loss.item(), rel=2e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_padding_is_computed_once_a_batch():
    sizes = []
    model, dataset = new_model(), new_dataset()
    model.transformer.h[0].register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape[:2])))
    Trainer(new_config(max_iters=1), model, dataset).run()
    assert sizes == [(1, PADDING), (8, 2 * LENGTH - 1)]


@pytest.mark.parametrize("trainer_class", [Trainer, PrefixTrainer])
def test_compile_goes_through_torch_compile(monkeypatch, trainer_class):
    compiled = []

    def fake_compile(model):
        def call(*args, **kwargs):
            compiled.append(model)
            return model(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", fake_compile)
    model = new_model()
    prefix = [new_prefix()] if trainer_class is PrefixTrainer else []
    trainer_class(new_config(max_iters=2), model, new_dataset(), *prefix).run()
    assert compiled == []
    trainer_class(new_config(max_iters=2, compile=True), model, new_dataset(), *prefix).run()
    assert compiled == [model, model]


def test_the_loss_is_computed_in_the_precision_that_was_asked_for():
    seen = []
    model = new_model()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(new_config(max_iters=1, precision=precision), model, new_dataset(prefix_padding=0))
        trainer.run()
        assert trainer.loss.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="float16"):
        Trainer(new_config(precision="float16"), model, new_dataset())


def test_progress_is_silent_where_nobody_looks(capfd):
    Trainer(new_config(), new_model(), new_dataset()).run()
    Trainer(new_config(progress=False), new_model(), new_dataset()).run()
    assert capfd.readouterr() == ("", "")


def test_progress_shows_the_loss_when_asked(capfd):
    trainer = Trainer(new_config(progress=True, log_every=1), new_model(), new_dataset())
    trainer.run()
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err
    assert f"loss {trainer.loss.item():.4f}" in err


def test_the_notebooks_callback_prints_every_thousand_iterations(capsys):
    trainer = Trainer(new_config(), new_model(), new_dataset())
    trainer.loss, trainer.iter_dt = torch.tensor(0.125), 0.0105
    for trainer.iter_num in (0, 1, 998, 999, 1000, 1998, 1999):
        batch_end_callback(trainer)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "1000:" in lines[0]
    assert "2000:" in lines[1]
    assert "0.12500" in lines[0]
    assert "10.50ms" in lines[0]


# ---------------------------------------------------------------------------------------------------- prefixes


def new_prefix(n_layer=2, n_positions=PADDING, n_embd=16, **options):
    return torch.randn((n_layer, n_positions, n_embd), requires_grad=True, **options)


SHAPES = {"activation": (3, 2, PADDING, 16), "key_value": (3, 2, 2, PADDING, 16), "prompt": (3, PADDING, 16)}


def train_prefixes(kind, initial, datasets, n_iters=20, **options):
    """The prefixes after training, and each iteration's gradients after clipping."""
    values = initial.clone().requires_grad_()
    gradients = []
    config = new_config(max_iters=n_iters, learning_rate=0.01, **options)
    trainer = PrefixTrainer(config, new_model(gain=8.0), datasets, Prefix(kind, values))
    trainer.add_callback(
        "on_batch_end", lambda trainer: gradients.append(trainer.adapter.values.grad.flatten(1).clone())
    )
    trainer.run()
    return values.detach(), torch.stack(gradients)


@pytest.mark.parametrize("kind", SHAPES)
def test_prefixes_trained_together_are_those_trained_alone(kind):
    """K = 3 different tasks, some of whose gradients are clipped and some not.

    The batches differ in size, so the results do in rounding; Adam's steps do not depend on the gradient's size, which
    keeps the difference at a few units in float32's last place.
    """
    set_seed(7)
    scale = torch.tensor([0.3, 1.0, 3.0]).view(-1, *[1] * (len(SHAPES[kind]) - 1))
    initial = torch.randn(SHAPES[kind]) * scale  # the size of a prefix decides the size of its gradient
    datasets = [new_dataset(task) for task in THREE_TASKS]
    alone = [(initial[k : k + 1], datasets[k : k + 1]) for k in range(3)]
    free = torch.cat([train_prefixes(kind, *one, n_iters=1, grad_norm_clip=1e9)[1][0] for one in alone]).norm(dim=1)
    clip = (free.min() * free.max()).sqrt().item()
    assert free.max() > 1.2 * free.min()

    values, gradients = train_prefixes(kind, initial, datasets, grad_norm_clip=clip)
    n_clipped = []
    for k, one in enumerate(alone):
        own_values, own_gradients = train_prefixes(kind, *one, grad_norm_clip=clip)
        n_clipped.append((own_gradients.norm(dim=2) > 0.999 * clip).sum().item())
        difference = (gradients[:, k] - own_gradients[:, 0]).norm(dim=1) / own_gradients[:, 0].norm(dim=1)
        assert difference[0] < 2e-6
        assert difference.max() < 1e-5
        assert (values[k] - own_values[0]).norm() < 2e-6 * (own_values[0] - initial[k]).norm()
    assert 0 < sum(n_clipped) < 60


def test_reparametrized_prefixes_trained_together_are_those_trained_alone():
    """Their networks and embeddings are apart, and a prefix's gradient is clipped over all of its own tensors."""
    start = torch.randn(SHAPES["key_value"], generator=torch.Generator().manual_seed(1))
    clip, datasets = 0.05, [new_dataset(task) for task in THREE_TASKS]

    def train(made, its_datasets):
        norms = []
        config = new_config(max_iters=8, learning_rate=0.01, grad_norm_clip=clip)
        trainer = AdapterTrainer(config, new_model(gain=8.0), its_datasets, made)
        gradients = lambda: torch.cat([p.grad.flatten(1) for p in made.parameters()], dim=1)  # noqa: E731
        trainer.add_callback("on_batch_end", lambda _: norms.append(gradients().norm(dim=1)))
        trainer.run()
        return made.prefix().values.detach(), torch.stack(norms)

    together = Reparametrization(new_model(), start)
    alone = [Reparametrization(new_model(), start[k : k + 1]) for k in range(3)]
    with torch.no_grad():
        for k, one in enumerate(alone):
            for own, of_all in zip(one.parameters(), together.parameters(), strict=True):
                own.copy_(of_all[k : k + 1])
    values, norms = train(together, datasets)
    torch.testing.assert_close(norms.max(dim=0).values, torch.full((3,), clip), rtol=1e-3, atol=0)
    for k, one in enumerate(alone):
        (expected,), _ = train(one, datasets[k : k + 1])
        change = (expected - start[k]).norm()
        assert change > 0.1
        assert (values[k] - expected).norm() < 1e-4 * change


def test_a_list_of_one_is_one():
    initial = torch.randn(1, 2, PADDING, 16)
    joint, _ = train_prefixes("activation", initial, [new_dataset()])
    single = initial[0].clone().requires_grad_()
    PrefixTrainer(new_config(max_iters=20, learning_rate=0.01), new_model(gain=8.0), new_dataset(), single).run()
    assert torch.equal(joint[0], single.detach())


def test_datasets_of_different_lengths_are_refused():
    """Rows of one length in tokens, but of different numbers of scored tokens: a plain mean would favour the longer."""
    datasets = [new_dataset(length=4, prefix_padding=3), new_dataset(length=3, prefix_padding=5)]
    with pytest.raises(ValueError, match=r"got \[\(3, 5\), \(4, 3\)\]"):
        PrefixTrainer(new_config(), new_model(), datasets, torch.randn(2, 2, PADDING, 16, requires_grad=True))


def test_a_list_of_anything_but_custom_datasets_is_refused():
    with pytest.raises(TypeError, match="CustomDatasets or TextDatasets, got a Pairs"):
        PrefixTrainer(new_config(), new_model(), [Pairs()], new_prefix()[None].detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prefix_device, device", [("cpu", "auto"), ("cuda", "cpu"), ("cuda", "auto")])
def test_a_prefix_of_any_device_moves_to_the_trainers(prefix_device, device):
    prefix = new_prefix(device=prefix_device)
    before = prefix.detach().clone()
    model = new_model()
    PrefixTrainer(new_config(device=device), model, new_dataset(), prefix).run()
    assert model.device.type == ("cuda" if device == "auto" else "cpu")
    assert prefix.device == model.device
    assert not torch.equal(prefix.cpu(), before.cpu())


@pytest.mark.parametrize("shape", [(2, PADDING, 16), (2, 2, PADDING, 16), (PADDING, 16)], ids=list(SHAPES))
def test_the_users_own_tensor_is_trained_and_the_model_is_not(shape):
    model = new_model(gain=8.0)
    model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = bytes_of(model)
    prefix = torch.randn(shape, requires_grad=True)
    before, address = prefix.detach().clone(), prefix.data_ptr()
    losses = []
    trainer = PrefixTrainer(new_config(max_iters=60, learning_rate=0.05), model, new_dataset(), prefix)
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    assert trainer.prefixes is prefix
    assert prefix.data_ptr() == address
    assert prefix.shape == shape
    assert (prefix.detach() != before).all()
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert bytes_of(model) == weights
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flags_are_restored_after_an_exception():
    model = new_model()
    model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = bytes_of(model)
    during = []

    def fail(trainer):
        during.extend(parameter.requires_grad for parameter in model.parameters())
        raise KeyboardInterrupt

    trainer = PrefixTrainer(new_config(), model, new_dataset(), new_prefix())
    trainer.add_callback("on_batch_end", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert during == [False] * len(flags)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert bytes_of(model) == weights


@pytest.mark.parametrize("weight_decay", [0.0, 10.0])
def test_weight_decay_does_not_apply_to_prefixes(weight_decay):
    set_seed(1)
    prefix = new_prefix()
    PrefixTrainer(new_config(weight_decay=weight_decay, learning_rate=0.1), new_model(), new_dataset(), prefix).run()
    set_seed(1)
    other = new_prefix()
    PrefixTrainer(new_config(learning_rate=0.1), new_model(), new_dataset(), other).run()
    assert torch.equal(prefix, other)


def test_a_prefix_of_any_memory_layout_is_trained():
    prefix = torch.randn(PADDING, 2, 16).transpose(0, 1).detach().requires_grad_()
    assert not prefix.is_contiguous()
    other = prefix.detach().contiguous().requires_grad_()
    for one in (prefix, other):
        PrefixTrainer(new_config(), new_model(), new_dataset(), one).run()
    assert torch.equal(prefix, other)


def test_a_shorter_prefix_leaves_padding():
    prefix = new_prefix(n_positions=PADDING - 1)
    trainer = PrefixTrainer(new_config(max_iters=1, learning_rate=0.0), new_model(), new_dataset(), prefix)
    trainer.run()
    x, y = new_dataset().batch(range(8))
    assert trainer.loss.item() == pytest.approx(new_model().eval()(x, y, prefixes=prefix)[1].item(), rel=1e-6)


def test_joint_batches_are_each_datasets_own():
    seen = []
    model, datasets = new_model(), [new_dataset(task) for task in THREE_TASKS]
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    prefixes = torch.randn(3, 2, PADDING, 16, requires_grad=True)
    PrefixTrainer(new_config(max_iters=2, batch_size=4), model, datasets, prefixes).run()
    for iteration, (x, y) in enumerate(seen):
        own = [dataset.batch(range(4 * iteration, 4 * iteration + 4)) for dataset in datasets]
        assert torch.equal(x, torch.cat([x for x, _ in own]))
        assert torch.equal(y, torch.cat([y for _, y in own]))


def plateau_config(**options):
    options = {"lr_schedule": "linear", "decay_fraction": 0.5, "validate_every": 5, "validation_rows": 20} | options
    return new_config(**{"max_iters": 60, "batch_size": 4, "learning_rate": 0.2, "patience": 10} | options)


def test_a_prefix_at_its_plateau_decays_by_itself_and_leaves_the_batch(monkeypatch):
    """The second answers all validation rows after 10 iterations; the first gets better, the third never."""
    accuracies = {"SortAscending": itertools.count(0, 0.05), "InverseBinary": iter([0.5, 1.0, 1.0, 0.9])}
    seen, values, asked = [], [], []

    def evaluate(model, dataset, prefix, n_rows, precision):
        (task,) = dataset.tasks
        asked.append((dataset.split, n_rows, precision, prefix.values.clone()))
        return SimpleNamespace(accuracy=next(accuracies.get(str(task), iter([0.7]))))

    monkeypatch.setattr("mingpt.trainer.evaluate", evaluate)
    model, datasets = new_model(gain=20.0), [new_dataset(task) for task in THREE_TASKS]
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    set_seed(3)
    prefixes = torch.randn(3, 2, PADDING, 16, requires_grad=True)
    trainer = PrefixTrainer(plateau_config(), model, datasets, prefixes)
    trainer.add_callback("on_batch_end", lambda _: values.append(prefixes.detach().clone()))
    trainer.run()
    assert {split for split, *_ in asked} == {"validation"}
    # The third was best at 5 and waited 10; both ends are twice where the decay began, since decay_fraction is a half.
    assert trainer.n_iters.tolist() == [60, 20, 30]
    assert [len(x) for x, _ in seen] == [12] * 20 + [8] * 10 + [4] * 30
    for k, end in enumerate(trainer.n_iters):
        moves = [not torch.equal(before[k], after[k]) for before, after in itertools.pairwise(values)]
        assert moves == [True] * (end - 1) + [False] * (60 - end)
    for iteration, (x, _) in enumerate(seen):
        learning = [datasets[k] for k, end in enumerate(trainer.n_iters) if end > iteration]
        assert torch.equal(x, torch.cat([data.batch(range(4 * iteration, 4 * iteration + 4))[0] for data in learning]))


def test_a_prefix_that_ends_early_ends_as_if_the_run_had_been_that_long():
    """Its steps are those of a run of 20 iterations whose rate decays over the last half."""
    short, early = (torch.full((1, 2, PADDING, 16), 0.1, requires_grad=True) for _ in range(2))
    PrefixTrainer(plateau_config(max_iters=20, validate_every=None), new_model(), [new_dataset()], short).run()
    trainer = PrefixTrainer(plateau_config(), new_model(), [new_dataset()], early)
    trainer.config.patience, trainer.config.validate_every = 0, 10
    trainer.run()
    assert trainer.n_iters.tolist() == [20]
    assert trainer.iter_num == 20
    assert torch.allclose(short, early, atol=1e-6)
    assert not torch.allclose(short, torch.full_like(short, 0.1), atol=1e-2)


def test_a_prefix_that_has_ended_rests_at_a_constant_rate_too(monkeypatch):
    """What is left of AdamW's momentum does not move it on."""
    scores = iter([1.0, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr("mingpt.trainer.evaluate", lambda *_, **__: SimpleNamespace(accuracy=next(scores)))
    prefixes, values = torch.randn(2, 2, PADDING, 16, requires_grad=True), []
    config = plateau_config(max_iters=12, validate_every=4, lr_schedule="constant")
    trainer = PrefixTrainer(config, new_model(), [new_dataset(), new_dataset()], prefixes)
    trainer.add_callback("on_batch_end", lambda _: values.append(prefixes.detach().clone()))
    trainer.run()
    assert trainer.n_iters.tolist() == [4, 12]
    assert torch.equal(values[3][0], values[-1][0])
    assert not torch.equal(values[3][1], values[-1][1])


def test_validation_accuracies_are_in_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    prefixes = torch.randn(3, 2, PADDING, 16, requires_grad=True)
    its_tasks = [tasks.Add1(), tasks.Add1(), tasks.Add1() + tasks.LessThan()]
    config = plateau_config(max_iters=12, metrics_path=path, log_every=10)
    trainer = PrefixTrainer(config, new_model(), [new_dataset(task) for task in its_tasks], prefixes)
    trainer.run()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iter"] for line in lines] == [5, 10, 12]
    names = ["Add1 (0)", "Add1 (1)", "Add1+LessThan"]
    assert [list(line.get("accuracies", ())) for line in lines] == [names, names, []]


@pytest.mark.parametrize("change", [{"max_iters": None}, {"decay_fraction": 1.0}, {"num_workers": 1}], ids=str)
def test_validation_is_refused_where_it_cannot_be(change):
    with pytest.raises(ValueError, match="validate_every needs"):
        PrefixTrainer(plateau_config(**change), new_model(), new_dataset(), new_prefix())


def build_wrong(case):
    prefix, datasets, error = new_prefix(), new_dataset(), ValueError
    joint = torch.randn(3, 2, PADDING, 16, requires_grad=True)
    if case == "padding":
        datasets, match = new_dataset(prefix_padding=PADDING - 1), "prefix_padding = 2"
    elif case == "one padding of three":
        prefix, match = joint, "one length and one prefix_padding"
        datasets = [new_dataset(), new_dataset(prefix_padding=0), new_dataset()]
    elif case == "K too small":
        prefix, datasets, match = joint, [new_dataset()] * 2, "3 adapters for 2 datasets"
    elif case == "K too large":
        prefix, datasets, match = joint, [new_dataset()] * 4, "3 adapters for 4 datasets"
    elif case == "several for one":
        prefix, match = Prefix("activation", joint), "3 adapters for 1 datasets"
    elif case == "no datasets":
        prefix, datasets, match = joint, [], "one length and one prefix_padding, got none"
    elif case == "no axis of K":
        datasets, match = [new_dataset()], r"\(K, L, P, C\)"
    elif case == "non-leaf":
        prefix, match = new_prefix() * 1, "is_leaf = False"
    elif case == "integers":
        prefix, match = torch.zeros(2, PADDING, 16, dtype=torch.int64), "floating dtype, got .* of torch.int64"
    elif case == "layers":
        prefix, match = new_prefix(n_layer=3), "3 layers, the model has 2"
    elif case == "channels":
        prefix, match = new_prefix(n_embd=8), "8 channels, the model has 16"
    elif case == "elsewhere":
        prefix, match, error = new_prefix(device="meta"), "meta", NotImplementedError
    elif case == "five axes":
        prefix, match = torch.randn(1, 1, 2, PADDING, 16), "activation"
    else:
        prefix, match, error = prefix.tolist(), "tensor", TypeError
    return prefix, datasets, match, error


@pytest.mark.parametrize(
    "case",
    ["padding", "one padding of three", "K too small", "K too large", "several for one", "no datasets", "no axis of K"]
    + ["non-leaf", "integers", "layers", "channels", "elsewhere", "five axes", "no tensor"],
)
def test_prefixes_that_do_not_fit_are_refused(case):
    prefix, datasets, match, error = build_wrong(case)
    with pytest.raises(error, match=match):
        PrefixTrainer(new_config(), new_model(), datasets, prefix)


def test_the_default_config_is_minGPTs():
    config = Trainer.get_default_config()
    assert isinstance(config, CfgNode)
    expected = {"device": "auto", "max_iters": None, "batch_size": 64, "learning_rate": 3e-4, "betas": (0.9, 0.95)}
    expected |= {"weight_decay": 0.1, "grad_norm_clip": 1.0, "optimizer": "adamw", "lr_schedule": "constant"}
    assert {key: value for key, value in config.to_dict().items() if key in expected} == expected
    assert Trainer.get_default_config() is not config
