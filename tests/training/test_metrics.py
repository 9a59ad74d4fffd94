"""The metrics file is JSON whatever the loss is, and a progress bar and TensorBoard show the same numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mingpt import distributed
from mingpt.storage import CheckpointError
from mingpt.trainer import Trainer
from mingpt.training import metrics
from mingpt.training.metrics import MetricsLogger, read_metrics


def new_config(tmp_path, **options):
    config = Trainer.get_default_config()
    config.merge_from_dict({"metrics_path": tmp_path / "folder" / "metrics.jsonl", "log_every": 2, "max_iters": 5})
    config.merge_from_dict(options)
    return config


def log(config, losses, first=0):
    with MetricsLogger(config, first) as logger:
        for number, loss in enumerate(losses, first + 1):
            logger.log_step(number, torch.tensor(loss), 0.5, 0.25)


def read_strictly(path):
    """Lines of JSON, which has no NaN and no Infinity."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_lines_come_every_few_iterations_and_at_the_end(tmp_path):
    config = new_config(tmp_path)
    log(config, [1.5, 2.5, 3.5, 4.5, 5.5])
    expected = [{"iter": n, "loss": n + 0.5, "learning_rate": 0.5, "iter_dt": 0.25} for n in (2, 4, 5)]
    assert read_strictly(config.metrics_path) == expected


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_null(tmp_path, loss):
    config = new_config(tmp_path)
    log(config, [1.0, loss, 1.0, 2.0])
    assert [line["loss"] for line in read_strictly(config.metrics_path)] == [None, 2.0]


def test_a_resumed_run_writes_its_lines_again(tmp_path):
    config = new_config(tmp_path, log_every=1)
    log(config, [1.0, 2.0, 3.0])
    log(config, [7.0], first=2)
    assert [line["loss"] for line in read_strictly(config.metrics_path)] == [1.0, 2.0, 7.0]
    log(config, [9.0])
    assert [line["loss"] for line in read_strictly(config.metrics_path)] == [9.0]


def test_only_the_main_process_logs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    config = new_config(tmp_path, progress=True)
    log(config, [1.0] * 5)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_files_are_closed_after_an_exception(tmp_path):
    config = new_config(tmp_path)
    with pytest.raises(KeyboardInterrupt), MetricsLogger(config, 0) as logger:
        raise KeyboardInterrupt
    assert logger._file.closed


def test_metrics_are_read_line_by_line(tmp_path):
    """A line that is being written, or that a kill has cut, is left out."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 10, "loss": 2.5}\n{"iter": 20, "loss": 1.25}\n{"iter": 30, "lo')
    assert read_metrics(path) == read_metrics(str(path)) == [{"iter": 10, "loss": 2.5}, {"iter": 20, "loss": 1.25}]


@pytest.mark.parametrize("line", [b'{"iter": 20, "lo', b"\xff", b"[" * 100_000, b"[1]", b'{"iter": NaN}', b"9" * 5000])
def test_d9_a_bad_line_of_metrics_is_named_and_drops_nothing(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"iter": 10, "loss": 2.5}\n' + line + b'\n{"iter": 30, "loss": 2.0}\n'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged, line 2"):
        read_metrics(path)
    with pytest.raises(CheckpointError, match="line 2"):
        MetricsLogger(new_config(tmp_path, metrics_path=path), 30)
    assert path.read_bytes() == content


@pytest.mark.parametrize(("progress", "n_lines"), [("auto", 2), (False, 0)])
def test_without_a_terminal_a_line_is_logged_now_and_then(tmp_path, monkeypatch, caplog, progress, n_lines):
    monkeypatch.setattr(metrics, "LOG_EVERY_S", 0.0)
    with caplog.at_level("INFO", logger="mingpt"):
        log(new_config(tmp_path, progress=progress, max_iters=9), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert len(caplog.messages) == n_lines
    assert caplog.messages[-1:] in ([], ["iteration 4 of 9, loss 4.0000"])
