"""Presets of the experiment, and the configuration of a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mingpt.storage.cache import read_json
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, nearest

PRESETS = {
    "smoke": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "trainer": {"max_iters": 30, "batch_size": 56, "warmup_iters": 5},
        "prefix": {"max_iters": 10, "batch_size": 4},
        "evaluation": {"n_rows": 100, "n_matrix_rows": 50},
    },
    "laptop": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 256},
        "trainer": {"max_iters": 700, "batch_size": 224, "checkpoint_every": 100},
        "prefix": {"max_iters": 400, "batch_size": 16, "checkpoint_every": 100},
    },
    "seed": {
        "model": {"n_layer": 12, "n_head": 8, "n_embd": 512},
        "trainer": {"max_iters": 600, "batch_size": 224, "checkpoint_every": 50},
        "prefix": {"max_iters": 400, "batch_size": 16, "checkpoint_every": 50},
        "evaluation": {"n_matrix_rows": 100},
    },
}
"""``smoke`` runs in seconds and learns nothing; ``laptop`` is the default; ``seed`` is the seed notebook's model."""


def get_default_config(preset: str = "laptop") -> CfgNode:
    """The configuration of a run: data, model, trainer (pretraining), prefix (their training) and evaluation.

    Raises:
        ValueError: for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; choose one of {', '.join(PRESETS)}")
    trainer = Trainer.get_default_config()
    trainer.merge_from_dict({"lr_schedule": "linear", "warmup_iters": 20, "decay_fraction": 0.9})
    trainer.merge_from_dict({"optimizer": "muon", "muon_learning_rate": 1.5e-3, "muon_momentum": 0.9})
    trainer.learning_rate = 2e-3
    prefix = Trainer.get_default_config()
    prefix.merge_from_dict({"lr_schedule": "linear", "warmup_iters": 10, "decay_fraction": 1.0})
    prefix.merge_from_dict({"learning_rate": 0.02, "converged_loss": 5e-4})
    model = CfgNode(n_layer=4, n_head=4, n_embd=256, dropout=0.0, skip_layer_norm=False)
    model.merge_from_dict({"gelu_approximate": "none", "init": "zero_residual"})
    config = CfgNode(
        preset=preset,
        seed=0,
        data=CfgNode(length=10, num_digits=10, prefix_size=10).close(),
        model=model.close(),
        trainer=trainer,
        prefix=prefix,
        evaluation=CfgNode(n_rows=3200, n_matrix_rows=400, precision="auto").close(),
    ).close()
    config.update_from(PRESETS[preset], f"preset {preset}")
    return config


def run_config(
    run: str | Path, preset: str | None = None, seed: int | None = None, overrides: Sequence[str] = ()
) -> CfgNode:
    """The configuration of a command on a run's folder.

    Args:
        run: the folder; its config.json, where there is one, is the default of every command on it.
        preset: for a new run, "laptop" by default.
        seed: for a new run, 0 by default.
        overrides: ``KEY=VALUE`` each, as in ``trainer.max_iters=10``.

    Raises:
        ValueError: for an unknown preset or key, a value of another type, a damaged config.json, or a preset or seed
            that the run does not have.
    """
    path = Path(run) / "config.json"
    saved = read_json(path) if path.is_file() else {}
    for name, asked in (("preset", preset), ("seed", seed)):
        if asked is not None and saved.get(name, asked) != asked:
            raise ValueError(f"{run} is a run of {name} {saved[name]!r}, not {asked!r}; choose another folder for it")
    config = get_default_config(preset or saved.get("preset", "laptop"))
    config.update_from(saved, str(path))
    config.seed = config.seed if seed is None else seed
    config.merge_from_args([f"--{override}" for override in overrides])
    return config
