"""A training run's metrics while it goes: a progress bar, a JSON-lines file, TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from mingpt import distributed
from mingpt.storage.files import CheckpointError, naming, read_json_lines, write_atomic
from mingpt.utils import CfgNode

RUNTIME_KEYS = {
    *("device", "num_workers", "parallel", "checkpoint_path", "checkpoint_every"),
    *("metrics_path", "tensorboard_path", "log_every", "progress"),
}
"""Configuration keys that say where a run is and how it is logged; a run that is resumed may change them."""


logger = logging.getLogger("mingpt")

LOG_EVERY_S = 20.0
"""Seconds between two lines of a log, where there is no terminal for a progress bar."""


class MetricsLogger(contextlib.ExitStack):
    """Logs a training run, on the main process only; a context manager, which closes its files."""

    def __init__(self, config: CfgNode, iter_num: int):
        """Open what the configuration asks for.

        Args:
            config: see ``Trainer.get_default_config``; has metrics_path, tensorboard_path, log_every, progress and
                max_iters.
            iter_num: how many iterations were done before. Lines of the file that come after them are dropped.
        """
        from tqdm import tqdm

        super().__init__()
        self.config, self._is_main, self._file, self._writer = config, distributed.is_main(), None, None
        if not self._is_main:
            return
        if config.metrics_path:
            self._file = self.enter_context(_open_metrics(Path(config.metrics_path), iter_num))
        if config.tensorboard_path:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = self.enter_context(SummaryWriter(str(config.tensorboard_path)))
        self._said = time.monotonic()
        is_hidden = None if config.progress == "auto" else not config.progress
        bar = tqdm(total=config.max_iters, initial=iter_num, disable=is_hidden, unit="it", dynamic_ncols=True)
        self._bar = self.enter_context(bar)

    def log_step(
        self,
        iter_num: int,
        loss: Tensor,
        learning_rate: float,
        iter_dt: float,
        accuracies: Mapping[str, float] | None = None,
    ) -> None:
        """Log an iteration: the bar moves at each, the rest is written every ``log_every`` and at ``max_iters``.

        Args:
            iter_num: its number, from 1 on.
            loss: a scalar, in nats for a language model. One that is not finite is null in the file.
            learning_rate: the one it used.
            iter_dt: seconds it took.
            accuracies: on validation rows, by name, 0 to 1; an iteration that has some is written in any case.
        """
        if not self._is_main:
            return
        self._bar.update()
        if iter_num % self.config.log_every and iter_num != self.config.max_iters and not accuracies:
            return
        value = loss.item()
        self._bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
        if self._bar.disable and self.config.progress == "auto" and time.monotonic() - self._said >= LOG_EVERY_S:
            self._said = time.monotonic()
            logger.info("iteration %d of %s, loss %.4f", iter_num, self.config.max_iters, value)
        if self._file is not None:
            line = {"iter": iter_num, "loss": value if math.isfinite(value) else None}
            line |= {"learning_rate": learning_rate, "iter_dt": iter_dt}
            line |= {"accuracies": accuracies} if accuracies else {}
            with naming(self._file.name):
                print(json.dumps(line, allow_nan=False), file=self._file, flush=True)
        if self._writer is not None:
            self._writer.add_scalar("loss", value, iter_num)
            self._writer.add_scalar("learning_rate", learning_rate, iter_num)


def _open_metrics(path: Path, iter_num: int) -> TextIO:
    """Open a JSON-lines file to append to, without the lines of iterations that a resumed run does again."""
    lines = read_metrics(path) if iter_num and path.exists() else []
    kept = [json.dumps(line) + "\n" for line in lines if line["iter"] <= iter_num]
    write_atomic(path, "".join(kept).encode())
    return path.open("a")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a run is writing at the moment is left out.

    Raises:
        CheckpointError: for a line that is none of a metrics file.
    """
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        if not (isinstance(line, dict) and isinstance(line.get("iter"), int)):
            raise CheckpointError(f"{path}: damaged, line {number} has no field 'iter'; delete the file")
    return lines


def validation_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The validation accuracies in a metrics file, by task: pairs of iteration and accuracy.

    Raises:
        CheckpointError: see ``read_metrics``.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(path):
        for task, accuracy in line.get("accuracies", {}).items():
            curves.setdefault(task, []).append((line["iter"], accuracy))
    return curves
