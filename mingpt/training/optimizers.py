"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mingpt.model import GPT
from mingpt.utils import CfgNode

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")


class Muon(Optimizer):
    """Momentum for matrices, with every update made orthogonal; another optimizer for what else a model has.

    It is ``torch.optim.Muon`` with Nesterov momentum and ``adjust_lr_fn="match_rms_adamw"``. The difference is speed:
    all matrices of one shape, or its transpose, are made orthogonal in one batch of products.

    Source: Jordan et al. 2024; the scale of the update, Liu et al. 2025.
    """

    def __init__(self, matrices: list[Tensor], others: Optimizer, lr: float, momentum: float, weight_decay: float):
        """Optimize ``matrices``, with decoupled weight decay as AdamW's.

        Args:
            matrices: of any shapes.
            others: is stepped too; its parameter groups come after that of the matrices.
            lr, momentum, weight_decay: of the matrices.
        """
        own = {"params": matrices, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([own, *others.param_groups], {})
        self.others = others

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        group = self.param_groups[0]
        rate, momentum = group["lr"], group["momentum"]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # by (rows, columns) of the wide form
        for p in (p for p in group["params"] if p.grad is not None):
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(buffer, momentum)
            n_rows, n_columns = sorted(p.shape)
            alike.setdefault((n_rows, n_columns), []).append((p, update if p.shape[0] == n_rows else update.T))
        for (_, n_columns), members in alike.items():
            orthogonal = orthogonalize(torch.stack([update for _, update in members]))
            for (p, _), update in zip(members, orthogonal, strict=True):
                p.mul_(1 - rate * group["weight_decay"])
                update = update if update.shape == p.shape else update.T
                p.add_(update, alpha=-0.2 * rate * math.sqrt(n_columns))
        # load_state_dict makes new ones
        self.others.param_groups, self.others.state = self.param_groups[1:], self.state
        self.others.step()


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by about 1: 0.7 to 1.2.

    Args:
        matrices: (N, m, n), m <= n.

    Returns:
        (N, m, n) of bfloat16.

    Source: five steps of Newton-Schulz with the coefficients of Jordan et al. 2024.
    """
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def build_optimizer(model: GPT, config: CfgNode) -> Optimizer:
    """The optimizer that ``config.optimizer`` names.

    "adamw" is the model's own ``configure_optimizers`` (minGPT's hook). "muon" updates the matrices of the
    transformer's blocks with Muon, at ``config.muon_learning_rate`` with ``config.muon_momentum``, and the rest as
    "adamw" does.

    Args:
        model: a GPT; for "adamw" any module with that hook.
        config: one that ``mingpt.trainer.check_config`` accepts.

    Raises:
        ValueError: for "muon" and a model that is no GPT.
    """
    optimizer = model.configure_optimizers(config)
    if config.optimizer == "adamw":
        return optimizer
    if not isinstance(model, GPT):
        raise ValueError(f"optimizer = 'muon' is for a GPT's blocks, {type(model).__name__} has none; use adamw")
    matrices = [module.weight for module in model.transformer.h.modules() if isinstance(module, nn.Linear)]
    chosen = set(matrices)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in chosen]
    return Muon(matrices, optimizer, config.muon_learning_rate, config.muon_momentum, config.weight_decay)


def learning_rate_factor(iteration: int, config: CfgNode, max_iters: int | None = None) -> float:
    """What the learning rates are multiplied by at an iteration: a linear warm-up, a plateau, and a decay to zero.

    Args:
        iteration: counts from 0.
        config: has lr_schedule ("constant", "linear" or "cosine", the shape of the decay), warmup_iters,
            decay_fraction (the last share of the run, over which it decays) and max_iters, where the decay ends.
        max_iters: in the place of the configuration's.
    """
    factor = min(1.0, (iteration + 1) / (config.warmup_iters + 1))
    if config.lr_schedule == "constant":
        return factor
    end: int = max_iters or config.max_iters
    n_decay = max(1.0, end * config.decay_fraction)
    left = min(1.0, max(0.0, (end - iteration) / n_decay))
    return factor * (left if config.lr_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
