"""A training script for test_trainer.py to start, kill, and start again.

As a program it reads one JSON object of ``train``'s arguments a line, runs each in a process of its own, and answers
with the process's id when it starts and its wait status when it ends. (It imports torch once for all of them.)
"""

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch  # noqa: F401 (like the next, to import it once for all processes)
import torch
import torch._dynamo

from mingpt import tasks
from mingpt import trainer as trainer_module
from mingpt.datasets import CustomDataset
from mingpt.model import GPT
from mingpt.storage import checkpoint
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.utils import set_seed

KINDS = ("muon", "map", "joint", "plateau")
N_ITERS = 40
CHECKPOINT_EVERY = 4
LOG_EVERY = 3
LAST_KILL = N_ITERS - 5
"""A run that is to be killed waits for it at this iteration."""


class MapDataset(torch.utils.data.Dataset):
    """Pairs of random tokens: any map-style dataset, with nothing else that the Trainer could know."""

    def __init__(self, n_examples=101):
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(9, (n_examples, 9), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index, :-1], self.tokens[index, 1:]


def digest(tensors, description=None):
    """SHA-256 of tensors' names, types, shapes and bytes, and of a JSON value."""
    sha = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def validation_score(model, dataset, *_, **__):
    """In the place of ``evaluate``: one task is solved at the first look, the other never."""
    return SimpleNamespace(accuracy=float("Add1" in map(str, dataset.tasks)))


def build_trainer(kind, folder, num_workers=0):
    """One of KINDS, with dropout; its tensors start from whatever the seed is, but for a prefix's frozen model."""
    config = Trainer.get_default_config()
    config.num_workers, config.device, config.progress = num_workers, "cpu", False
    config.max_iters, config.batch_size, config.log_every = N_ITERS, 8, LOG_EVERY
    config.checkpoint_every, config.checkpoint_path = CHECKPOINT_EVERY, str(Path(folder) / "run.safetensors")
    config.metrics_path = str(Path(folder) / "metrics.jsonl")
    config.lr_schedule, config.warmup_iters = ("cosine" if kind == "map" else "linear"), 5
    config.optimizer = "muon" if kind == "muon" else "adamw"
    config.learning_rate = 0.01

    options = {"length": 4, "num_digits": 6, "prefix_padding": 2}
    some_tasks = [tasks.SortAscending(), tasks.InverseBinary()]
    mixture = CustomDataset("train", some_tasks, **options)
    model_config = GPT.get_default_config()
    model_config.model_type = None
    model_config.n_layer, model_config.n_head, model_config.n_embd = 2, 2, 16
    model_config.vocab_size, model_config.block_size = mixture.get_vocab_size(), mixture.get_block_size()
    model_config.embd_pdrop = model_config.resid_pdrop = model_config.attn_pdrop = 0.2
    if kind in ("joint", "plateau"):
        config.learning_rate = 0.05
        if kind == "plateau":
            config.validate_every = 3
            trainer_module.evaluate = validation_score
        state = torch.get_rng_state()
        set_seed(0)
        model = GPT(model_config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter *= 8  # at GPT-2's initialisation a small model hardly reacts to anything
        torch.set_rng_state(state)
        both = [tasks.SortAscending(), tasks.Add1() if kind == "plateau" else tasks.InverseBinary()]
        datasets = [CustomDataset("train", [task], **options) for task in both]
        prefixes = torch.randn((2, 2, 2, 16), requires_grad=True)
        return PrefixTrainer(config, model, datasets, prefixes)
    return Trainer(config, GPT(model_config), mixture if kind == "muon" else MapDataset())


def train(kind, folder, seed, num_workers=0, is_to_be_killed=False):
    """Train; leave each iteration's data and loss in progress.jsonl, and digests of all that came out in result.json.

    ``seed`` is what the process starts from; a resumed run must not depend on it.
    """
    torch.set_num_threads(1)
    set_seed(seed)
    trainer = build_trainer(kind, folder, num_workers)
    batches = []
    trainer.model.register_forward_pre_hook(  # of training only; a validation has no targets
        lambda _, xy: batches.append(digest({"x": xy[0], "y": xy[1]})) if len(xy) > 1 else None
    )
    with (Path(folder) / "progress.jsonl").open("a") as progress:

        def on_batch_end(trainer):
            line = {"iter": trainer.iter_num, "data": batches[-1], "loss": trainer.loss.item().hex()}
            progress.write(json.dumps(line) + "\n")
            progress.flush()
            if is_to_be_killed and trainer.iter_num >= LAST_KILL:
                time.sleep(60)

        trainer.add_callback("on_batch_end", on_batch_end)
        trainer.run()
    optimizer, skeleton = checkpoint.flatten_state(trainer.optimizer.state_dict(), "optimizer")
    tensors, description = checkpoint.load_checkpoint(trainer.config.checkpoint_path)
    description["state"].pop("seconds", None)  # how long it took is another time another
    result = {
        "weights": digest(trainer.model.state_dict()),
        "trained": digest(trainer.trained_tensors()),
        "optimizer": digest(optimizer),
        "groups": digest({}, skeleton),
        "rng": digest({"cpu": torch.get_rng_state()}),
        "checkpoint": digest(tensors, description),
    }
    (Path(folder) / "result.json").write_text(json.dumps(result))


def main():
    for line in sys.stdin:
        process = os.fork()
        if not process:
            try:
                train(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)


if __name__ == "__main__":
    main()
