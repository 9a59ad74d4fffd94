"""Tensors that are split over processes: whole ones of them, and tensor parallelism by rules.

Tensor parallelism splits the parameters whose names match over the processes of a mesh. A module that owns one computes
its part and gathers its output, so everything around it sees whole, ordinary tensors: attention, caches and sampling do
not know. Such a module is one that computes with its own parameters in ``forward``, as Linear, Embedding and LayerNorm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from mingpt.distributed.process_group import world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Rules = Sequence[tuple[str, Any]]
"""(regular expression, placement) pairs: the first whose expression is found in a parameter's name holds for it."""


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gradient, gathered from all processes where it is split; those must get here too then."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which all processes have, split as ``other`` is; itself where that is whole."""
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
    names = [name for name, _ in model.named_parameters()]
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"no parameter's name matches the rule {pattern!r}; names are like {names[0]}, {names[-1]}"
            )

    def to_mesh(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            DTensor.from_local(each, mesh, [Replicate()], run_check=False) if isinstance(each, torch.Tensor) else each
            for each in inputs
        )

    def gathered(_: nn.Module, __: Any, output: DTensor) -> torch.Tensor:
        return output.full_tensor()

    for owner, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        placements = {
            name: next((place for pattern, place in rules if re.search(pattern, f"{owner}.{name}".lstrip("."))), None)
            for name in own
        }
        if not any(placements.values()) or any(isinstance(each, DTensor) for each in own.values()):
            continue
        for name, parameter in own.items():
            split = distribute_tensor(parameter.detach(), mesh, [placements[name] or Replicate()])
            module.register_parameter(name, nn.Parameter(split, requires_grad=False))
        module.register_forward_pre_hook(to_mesh)
        module.register_forward_hook(gathered)


def fully_shard(model: Any, device_type: str) -> None:
    """Split every parameter of a GPT over all processes, block by block, for training (FSDP2); once is enough."""
    if isinstance(next(model.parameters()), DTensor):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard_module
    from torch.distributed.fsdp import register_fsdp_forward_method

    mesh = init_device_mesh(device_type, (world_size(),))
    for block in model.blocks:
        shard_module(block, mesh=mesh)
        register_fsdp_forward_method(block, "keys_values")
    shard_module(model, mesh=mesh)
    register_fsdp_forward_method(model, "forward_cached")
