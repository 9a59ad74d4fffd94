"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mingpt.utils import CfgNode

SCHEDULES = ("constant", "linear", "cosine")


class ChainedOptimizer:
    """Several optimizers, each with its own parameters, that act as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them; changing a group changes its optimizer."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def build_optimizer(model: Any, config: CfgNode) -> Any:
    """The optimizer that ``config.optimizer`` names.

    "adamw" is the model's own ``configure_optimizers`` (minGPT's hook). "muon" updates the matrices of the
    transformer's blocks with Muon, at ``config.muon_learning_rate`` with ``config.muon_momentum``, and the rest as
    "adamw" does.

    Raises:
        ValueError: for another name.

    Source: Muon, Jordan et al. 2024; the scale of its update matched to AdamW's, Liu et al. 2025.
    """
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"unknown optimizer {config.optimizer!r}; choose adamw or muon")
    everything = model.configure_optimizers(config)
    if config.optimizer == "adamw":
        return everything
    if not hasattr(model, "transformer"):
        raise ValueError(f"optimizer = 'muon' is for a GPT's blocks, {type(model).__name__} has none; use adamw")
    matrices = [m.weight for m in model.transformer.h.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in matrices}
    for group in everything.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_learning_rate,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return ChainedOptimizer(muon, everything)


def learning_rate_factor(iteration: int, config: CfgNode) -> float:
    """What the learning rates are multiplied by at an iteration: a linear warm-up, a plateau, and a decay to zero.

    Args:
        iteration: counts from 0.
        config: has lr_schedule ("constant", "linear" or "cosine", the shape of the decay), warmup_iters,
            decay_fraction (the last share of the run, over which it decays) and max_iters.

    Raises:
        ValueError: for an unknown schedule, or a decay without max_iters.
    """
    if config.lr_schedule not in SCHEDULES:
        raise ValueError(f"unknown lr_schedule {config.lr_schedule!r}; choose one of {', '.join(SCHEDULES)}")
    factor = min(1.0, (iteration + 1) / (config.warmup_iters + 1))
    if config.lr_schedule == "constant":
        return factor
    if config.max_iters is None:
        raise ValueError(f"lr_schedule = {config.lr_schedule!r} needs max_iters, the end of the decay")
    n_decay = max(1.0, config.max_iters * config.decay_fraction)
    left = min(1.0, (config.max_iters - iteration) / n_decay)
    return factor * (left if config.lr_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
