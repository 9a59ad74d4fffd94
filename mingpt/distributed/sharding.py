"""Tensors that are split over processes: their full values, and tensor parallelism by rules.

Tensor parallelism splits the parameters whose names match over the processes of a mesh. A module that owns one computes
its shard and gathers its output, so everything around it sees full, ordinary tensors: attention, caches and sampling do
not know. Such a module is one that computes with its own parameters in ``forward``, as Linear, Embedding and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from mingpt.distributed.process_group import all_gather, rank, world_size
from mingpt.utils import match_rules

Rules = Sequence[tuple[str, Placement]]
"""(regular expression, placement) pairs: the first whose expression is found in a parameter's name holds for it."""

FSDP_DIMENSION = ("data",)
"""The dimension of the mesh that ``fully_shard`` splits a model over, on which each process has rows of its own."""


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
    """Split the parameters of a model in place; it is for prediction and for training prefixes from then on.

    Args:
        model: with the same weights on every process; those of the mesh's first one are taken.
        mesh: of one dimension, the processes that share the model.
        rules: see ``Rules``; placements are torch.distributed.tensor's, ``Shard(0)`` splits the rows of a weight.

    Raises:
        ValueError: for a rule that no parameter matches.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    rule_of = match_rules((pattern for pattern, _ in rules), names, "parameter")

    def forward(whole_forward: Callable[..., DTensor], x: torch.Tensor, *others: Any) -> torch.Tensor:
        return whole_forward(DTensor.from_local(x, mesh, [Replicate()], run_check=False), *others).full_tensor()

    for owner, module in model.named_modules():
        own = dict(module.named_parameters(prefix=owner, recurse=False))
        if own.keys().isdisjoint(rule_of) or any(isinstance(parameter, DTensor) for parameter in own.values()):
            continue
        for name, parameter in own.items():
            placement = rules[rule_of[name]][1] if name in rule_of else Replicate()
            split = distribute_tensor(parameter.detach(), mesh, [placement])
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(split, requires_grad=False))
        module.forward = partial(forward, module.forward)  # not by hooks: others' hooks see ordinary tensors


def data_shard(model: nn.Module) -> tuple[int, int]:
    """Which share of a batch this process computes, and of how many: those that ``shard`` gave one model have the same.

    All processes must get here.
    """
    mesh = _mesh_of(model)
    if mesh is None or is_fully_sharded(model):
        return rank(), world_size()
    first = int(mesh.mesh.min())
    firsts = sorted(set(all_gather(first)))
    return firsts.index(first), len(firsts)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has split a model, so that all processes must call it alike."""
    mesh = _mesh_of(model)
    return mesh is not None and mesh.mesh_dim_names == FSDP_DIMENSION


def _mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The processes over which a model is split."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def fully_shard(model: nn.Module, blocks: Iterable[nn.Module], device_type: str) -> None:
    """Split every parameter of a GPT or a CausalLM over all processes, block by block, for training (FSDP2).

    A model that is split already stays as it is.
    """
    if _mesh_of(model) is not None:
        return
    from torch.distributed import fsdp

    model = getattr(model, "model", model)  # a CausalLM's methods call the model of transformers
    mesh = init_device_mesh(device_type, (world_size(),), mesh_dim_names=FSDP_DIMENSION)
    for module in (*blocks, model):
        fsdp.fully_shard(module, mesh=mesh)
        for name in ("keys_values", "forward_cached"):  # a GPT's, called in the place of forward
            if hasattr(module, name):
                fsdp.register_fsdp_forward_method(module, name)


def unshard_before_backward(block: nn.Module, tensors: Iterable[torch.Tensor]) -> None:
    """Have a block's parameters full when gradients reach tensors that it has made without returning them.

    FSDP2 does it for what a block returns. Where the block is not split, nothing is done.
    """
    unshard: Any = getattr(block, "unshard", None)
    for tensor in tensors:
        if unshard and tensor.requires_grad:
            tensor.register_hook(lambda _: unshard())
