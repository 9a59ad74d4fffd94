"""Presets of the experiment, whose settings are in ``presets.toml``, and the configuration of a run's folder."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Sequence
from pathlib import Path

from mingpt.storage.checkpoint import json_checksum
from mingpt.storage.files import parsing, read_json
from mingpt.trainer import Trainer, recipe
from mingpt.utils import CfgNode, nearest


def get_default_config(preset: str = "laptop") -> CfgNode:
    """The configuration of a run: data, model, trainer (pretraining), prefix (their training) and evaluation.

    Raises:
        ValueError: for an unknown preset.
    """
    presets = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    every = presets.pop("every")
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}{nearest(preset, presets)}; choose one of {', '.join(presets)}")
    groups = {name: CfgNode(**settings).close() for name, settings in every.items()}
    groups |= {"trainer": Trainer.get_default_config(), "prefix": Trainer.get_default_config()}
    config = CfgNode(preset=preset, seed=0, **groups).close()
    for name, settings in (("every", every), (preset, presets[preset])):
        config.update_from(settings, f"preset {name}")
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
    with parsing(path, "the settings of a run") if saved else contextlib.nullcontext():
        config = get_default_config(preset or saved.get("preset", "laptop"))
        config.update_from(saved, "it")
    config.seed = config.seed if seed is None else seed
    config.merge_from_args([f"--{override}" for override in overrides])
    return config


def run_folder(name: str, config: CfgNode, root: str | Path = "..") -> Path:
    """Where a notebook's run is: the stored one of this name if its model has these settings, else one of its own.

    Args:
        name: of the run.
        config: its settings; those of what is trained beside the model may differ.
        root: that has "checkpoints" and "runs", by default the folder above.

    Returns:
        ``checkpoints/NAME``, ``runs/NAME``, or where that too is of another model ``runs/NAME-<hash>``.
    """

    def settings(own: CfgNode) -> list[object]:
        return [own.seed, own.data.to_dict(), own.model.to_dict(), recipe(own.trainer)]

    stored, new = (Path(root) / folder / name for folder in ("checkpoints", "runs"))
    for path in (stored, new):
        if (path / "config.json").exists() and settings(run_config(path)) == settings(config):
            return path
    return new.with_name(f"{name}-{json_checksum(settings(config))[:8]}") if new.exists() else new
