"""The processes of one job, which torchrun started: which is the main one, and how they agree on a value.

A program that torchrun did not start is a job of one process; everything here works for it too and sends nothing.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class MainProcessError(RuntimeError):
    """What the other processes raise when the main one has failed; it says why."""


def init_process_group() -> None:
    """Join the job's other processes where torchrun started this one; a second call does nothing."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """This process's number, from 0 on."""
    init_process_group()
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    init_process_group()
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which prints, writes files, and computes what is computed once."""
    return rank() == 0


def run_on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process only, and have all processes return what it returned.

    All processes must get here; those that are not the main one wait.

    Args:
        function: of no arguments; its result must be picklable where there are several processes.

    Raises:
        MainProcessError: on the other processes, with the text of what the function raised on the main one.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if is_main():
        try:
            outcome[0] = function()
        except Exception as raised:
            error, outcome[1] = raised, f"{type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise MainProcessError(f"the main process failed: {outcome[1]}")
    return outcome[0]


def all_gather(value: T) -> list[T]:
    """Every process's value, in the order of their numbers, on every process. All processes must get here."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def map_over_ranks(jobs: Mapping[Any, Callable[[], T]]) -> dict[Any, T]:
    """Do jobs, each process its share of them, and give all processes all results in the order of the jobs.

    All processes must get here, with the same jobs; a job must not wait for another process.
    """
    from tqdm import tqdm

    own = list(jobs)[rank() :: world_size()]
    hidden = None if is_main() else True
    parts = all_gather({name: jobs[name]() for name in tqdm(own, disable=hidden, unit="job")})
    results = {name: result for part in parts for name, result in part.items()}
    return {name: results[name] for name in jobs}


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Have every process's tensors hold what the main one's do."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, computed in place. All processes must get here."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name says (stand-in until the merge)."""
    init_process_group()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; choose auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available; there is no GPU, choose cpu or auto")
    return found
