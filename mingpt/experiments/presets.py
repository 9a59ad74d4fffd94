"""The settings of a run: presets, and what its folder says (stand-in until the merge)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mingpt.experiments.reproduction import get_default_config
from mingpt.utils import CfgNode

__all__ = ["get_default_config", "run_config"]


def run_config(run: Path, preset: str | None, seed: int | None, overrides: Sequence[str]) -> CfgNode:
    """The configuration of a run: its config.json, else the preset's; then the seed and the overrides."""
    path = Path(run) / "config.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name, given in (("preset", preset), ("seed", seed)):
        if saved and given is not None and given != saved[name]:
            raise ValueError(f"{run} is a run with {name} = {saved[name]!r}, not {given!r}; choose another folder")
    config = get_default_config(preset or saved.get("preset") or "laptop")
    if seed is not None:
        config.seed = seed
    for group, values in saved.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            config.override(f"{group}.{key}", value)
    if saved:
        config.seed = saved["seed"]
    config.merge_from_args([f"--{override}" for override in overrides])
    for group, key in (("trainer", "batch_size"), ("trainer", "max_iters"), ("evaluation", "n_matrix_rows")):
        value = getattr(getattr(config, group), key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{group}.{key} must be a positive integer, got {value!r}")
    return config
