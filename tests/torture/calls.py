"""What the server runs beside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mingpt.data_tools import CustomDataset, SortAscending
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import set_seed


def new_trainer(path: str | Path) -> Trainer:
    """A Trainer with a checkpoint and metrics, as a user's script has it."""
    set_seed(0)
    config = Trainer.get_default_config()
    config.merge_from_dict({"max_iters": 4, "checkpoint_every": 1, "batch_size": 4, "log_every": 1, "progress": False})
    config.merge_from_dict({"checkpoint_path": path, "metrics_path": Path(path).with_name("metrics.jsonl")})
    data = CustomDataset("train", [SortAscending()], length=4)
    model_config = GPT.get_default_config()
    model_config.merge_from_dict(
        {"model_type": None, "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 13, "block_size": 7}
    )
    return Trainer(config, GPT(model_config), data)


def bare_trainer() -> None:
    """Run it."""
    new_trainer("run/state.safetensors").run()


def mutations(*args: Any) -> None:
    """See ``torture.hostile``."""
    from torture import hostile

    hostile.mutations(*args)
