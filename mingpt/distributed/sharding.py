"""Tensors that are split over processes: their full values, and tensor parallelism by rules.

Tensor parallelism splits the parameters whose names match over the processes of a mesh. A module that owns one computes
its shard and gathers its output, so everything around it sees full, ordinary tensors: attention, caches and sampling do
not know. Such a module is one that computes with its own parameters in ``forward``, as Linear, Embedding and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from mingpt.distributed.process_group import world_size
from mingpt.utils import match_rules

Rules = Sequence[tuple[str, Placement]]
"""(regular expression, placement) pairs: the first whose expression is found in a parameter's name holds for it."""


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gradient, gathered from all processes where it is split; those must get here too then."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A full tensor, which all processes have, split as ``other`` is; itself where that is not split."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def shard(model: nn.Module, mesh: DeviceMesh, rules: Rules) -> None:
    """Split the parameters of a model in place; it is for prediction from then on.

    Args:
        model: with the same weights on every process; those of the mesh's first one are taken.
        mesh: of one dimension, the processes that share the model.
        rules: see ``Rules``; placements are torch.distributed.tensor's, ``Shard(0)`` splits the rows of a weight.

    Raises:
        ValueError: for a rule that no parameter matches.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    rule_of = match_rules((pattern for pattern, _ in rules), names, "parameter")

    def to_mesh(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]

    for owner, module in model.named_modules():
        own = dict(module.named_parameters(prefix=owner, recurse=False))
        if own.keys().isdisjoint(rule_of) or any(isinstance(parameter, DTensor) for parameter in own.values()):
            continue
        for name, parameter in own.items():
            placement = rules[rule_of[name]][1] if name in rule_of else Replicate()
            split = distribute_tensor(parameter.detach(), mesh, [placement])
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(split, requires_grad=False))
        module.register_forward_pre_hook(to_mesh)
        module.register_forward_hook(lambda _, __, output: output.full_tensor())


def fully_shard(model: nn.Module, blocks: Iterable[nn.Module], device_type: str) -> None:
    """Split every parameter of a GPT over all processes, block by block, for training (FSDP2); once is enough."""
    if isinstance(next(model.parameters()), DTensor):
        return
    from torch.distributed import fsdp

    mesh = init_device_mesh(device_type, (world_size(),))
    for block in blocks:
        fsdp.fully_shard(block, mesh=mesh)
        fsdp.register_fsdp_forward_method(block, "keys_values")
    fsdp.fully_shard(model, mesh=mesh)
    fsdp.register_fsdp_forward_method(model, "forward_cached")
