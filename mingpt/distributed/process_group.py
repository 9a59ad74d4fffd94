"""The processes of one job, which torchrun started: which is the main one, and how they agree on a value.

A program that torchrun did not start is a job of one process; everything here works for it too and sends nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

SILENCE_S = 20.0
"""After how many seconds without a sign of life a process is said to be silent."""


class OtherProcessError(RuntimeError):
    """What a process raises when another one has failed; it says which and why."""


def init_process_group() -> None:
    """Join the job's other processes where torchrun started this one; a second call does nothing.

    Each process takes one GPU of its machine, in turn where there are fewer GPUs than processes. The environment
    variable MINGPT_TIMEOUT_S says for how many seconds a process waits for the others, 1,800 by default. Which process
    has stopped is said after SILENCE_S seconds.
    """
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return
    import torch.distributed.nn  # imported later, it keeps the group of then for ever, and gloo's threads abort at exit

    if gpus := _gpus():
        torch.cuda.set_device(torch.device(gpus[0]))
    has_own_gpu = len(gpus) >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL refuses two processes on one GPU
    timeout = timedelta(seconds=float(os.environ.get("MINGPT_TIMEOUT_S", "1800")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if has_own_gpu else "gloo", timeout=timeout)
    atexit.register(dist.destroy_process_group)
    _start_heartbeat()


def _start_heartbeat() -> None:
    heartbeat = _Heartbeat(distributed_c10d.PrefixStore("heartbeat", distributed_c10d._get_default_store()))
    heartbeat.start()
    atexit.register(heartbeat.stop)


class _Heartbeat(threading.Thread):
    """Gives a sign of life every few seconds, and says on standard error which other process gives none any more."""

    def __init__(self, store: Any):
        super().__init__(daemon=True)
        self.store, self.is_over = store, threading.Event()

    def run(self) -> None:
        own, silent = dist.get_rank(), set()
        seen: dict[int, tuple[bytes, float]] = {n: (b"", time.monotonic()) for n in range(dist.get_world_size())}
        for number in itertools.count():
            try:
                self.store.set(str(own), str(number))
                for other, (before, since) in seen.items():
                    beat = self.store.get(str(other)) if self.store.check([str(other)]) else b""
                    if beat != before or beat == b"over":
                        seen[other] = beat, time.monotonic()
                        silent.discard(other)
                    elif other not in silent and time.monotonic() - since > SILENCE_S:
                        silent.add(other)
                        if silent >= set(range(own)):  # the first process that lives speaks
                            seconds = os.environ.get("MINGPT_TIMEOUT_S", "1800")
                            text = f"process {other} has given no sign of life for {SILENCE_S} s; it is waited for"
                            print(f"{text} up to MINGPT_TIMEOUT_S = {seconds} s", file=sys.stderr, flush=True)
            except RuntimeError:  # the store went with the process that has it
                return
            if self.is_over.wait(SILENCE_S / 5):
                return

    def stop(self) -> None:
        """End, and let the others know that this process needs no sign of life any more."""
        self.is_over.set()
        self.join(5)
        with contextlib.suppress(RuntimeError):
            self.store.set(str(dist.get_rank()), "over")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Say where this process computes; joins the process group first, so that nothing is moved before.

    Args:
        device: "auto" for this process's GPU where there is one and the CPU otherwise, or a device of torch; "cuda" is
            this process's GPU.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    init_process_group()
    gpus = _gpus()
    available = ["cpu", *sorted(gpus), *(["mps", "mps:0"] if torch.backends.mps.is_available() else [])]
    name = str(device)
    if name == "auto" or (name == "cuda" and gpus):
        name = gpus[0] if gpus else "cpu"
    if name not in available:
        raise ValueError(f'there is no device {name!r}; this machine has {", ".join(available)}; or give "auto"')
    return torch.device(name)


def _gpus() -> list[str]:
    """The GPUs of this machine, from this process's own one on."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = int(os.environ.get("LOCAL_RANK", "0"))
    return [f"cuda:{(own + i) % n_gpus}" for i in range(n_gpus)]


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
    """Call a function on the main process only, and return its result on all processes.

    All processes must get here; those that are not the main one wait.

    Args:
        function: of no arguments; its result must be picklable where there are several processes.

    Raises:
        OtherProcessError: on the other processes, with the text of what the function raised on the main one.
    """
    return _call_on_all(function if is_main() else lambda: None)[0]


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

    Raises:
        OtherProcessError: on all processes but the one whose job failed, with the text of what it raised there.
    """
    from tqdm import tqdm

    own = tqdm(list(jobs)[rank() :: world_size()], disable=None if is_main() else True, unit="job")
    results = ChainMap(*_call_on_all(lambda: {name: jobs[name]() for name in own}))
    return {name: results[name] for name in jobs}


def _call_on_all(function: Callable[[], Any]) -> list[Any]:
    """What each process's function returns, on every process; or an error on all of them, where one has failed."""
    result, error = None, None
    try:
        result = function()
    except Exception as raised:  # kept until the processes have met
        error = raised
    results_and_errors = all_gather((result, error and f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for number, (_, text) in enumerate(results_and_errors):
        if text is not None:
            raise OtherProcessError(f"process {number} failed: {text}")
    return [result for result, _ in results_and_errors]


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy the main process's values into every process's tensors, in place. All processes must get here."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, computed in place. All processes must get here."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest of every process's numbers, on every process. All processes must get here."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)
