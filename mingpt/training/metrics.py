"""What is to be seen of a training run while it goes: a progress bar, a file of metrics, TensorBoard's events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mingpt import distributed
from mingpt.storage import checkpoint

RUNTIME_KEYS = {
    *("device", "num_workers", "parallel", "checkpoint_path", "checkpoint_every"),
    *("metrics_path", "tensorboard_path", "log_every", "progress"),
}
"""Configuration keys that say where a run is and how it is watched; they may change between the parts of one run."""


@contextlib.contextmanager
def watch(trainer: Any) -> Iterator[Callable[[], None]]:
    """Open the progress bar and the metrics file of a Trainer; yields what to call after each iteration."""
    from tqdm import tqdm

    config = trainer.config
    if not distributed.is_main():
        yield lambda: None
        return
    bar = tqdm(
        total=config.max_iters,
        initial=trainer.iter_num,
        disable=None if config.progress == "auto" else not config.progress,
        unit="it",
        dynamic_ncols=True,
    )
    writer = _tensorboard_writer(config.tensorboard_path)
    with contextlib.ExitStack() as stack:
        stack.callback(bar.close)
        if writer is not None:
            stack.callback(writer.close)
        file = (
            stack.enter_context(_open_metrics(config.metrics_path, trainer.iter_num)) if config.metrics_path else None
        )

        def report() -> None:
            bar.update()
            if trainer.iter_num % config.log_every and trainer.iter_num != config.max_iters:
                return
            loss = trainer.loss.item()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            rate = trainer.optimizer.param_groups[-1]["lr"]
            if file is not None:
                line = {"iter": trainer.iter_num, "loss": loss, "learning_rate": rate, "iter_dt": trainer.iter_dt}
                file.write(json.dumps(line) + "\n")
                file.flush()
            if writer is not None:
                writer.add_scalar("loss", loss, trainer.iter_num)
                writer.add_scalar("learning_rate", rate, trainer.iter_num)

        yield report


@contextlib.contextmanager
def _open_metrics(path: str | Path, iter_num: int) -> Iterator[Any]:
    """Open a JSON-lines file to append to, without the lines of iterations that a resumed run is to do again."""
    path = Path(path)
    kept = []
    if iter_num and path.exists():
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed may leave half a line
            kept.extend(line for line in path.read_text().splitlines(True) if json.loads(line)["iter"] <= iter_num)
    checkpoint.write_atomic(path, "".join(kept).encode())
    with path.open("a") as file:
        yield file


def _tensorboard_writer(path: str | Path | None) -> Any:
    if path is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path))
