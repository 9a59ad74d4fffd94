"""The processes of one job that torchrun started, and tensors that are split over them.

``process_group`` says which rank this process is, where it computes, and how all ranks agree on a value. ``sharding``
splits a model.
"""

from mingpt.distributed.process_group import (
    OtherProcessError,
    all_gather,
    all_reduce_max,
    all_reduce_sum,
    broadcast,
    init_process_group,
    is_main,
    map_over_ranks,
    rank,
    resolve_device,
    run_on_main,
    world_size,
)

__all__ = [
    "OtherProcessError", "all_gather", "all_reduce_max", "all_reduce_sum", "broadcast", "init_process_group", "is_main",
    "map_over_ranks", "rank", "resolve_device", "run_on_main", "world_size",
]  # fmt: skip
