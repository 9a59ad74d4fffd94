"""Runs commands in forks of one process that has everything imported, so that a run costs no start-up.

It reads a JSON job a line: {"argv": [...]} for a command or {"call": name} for a function of ``torture.calls``, with
"cwd", "root", "k", "action" (see shim.c), "limit_s", and "signal": [number, seconds after which it is sent]. It answers
with a line: {"rc", "count", "out", "err"}, or {"pid"} of a process that has stopped, for {"continue": pid}.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)

import matplotlib.pyplot  # noqa: E402
import pandas  # noqa: E402, F401
import peft  # noqa: E402, F401
import seaborn  # noqa: E402, F401
import transformers  # noqa: E402, F401
from matplotlib.figure import Figure  # noqa: E402

from mingpt import cli  # noqa: E402
from mingpt.analysis import figures  # noqa: E402
from torture import calls  # noqa: E402

shim = ctypes.CDLL(None)

# Drawing takes most of the time of 'reproduce': the figures are written as ever, and are empty.
for name in (
    "accuracy_matrix_figure",
    "paired_bars",
    "position_accuracy_figure",
    "learning_curves",
    "validation_curves",
):
    setattr(figures, name, lambda *_, **__: Figure((1, 1)))
figures.attention_visualization = figures.learning_curves


def child(job: dict, files: list[io.BufferedRandom], count: ctypes.c_long) -> int:
    """Do a job and return the exit code; the standard streams are files."""
    os.dup2(files[0].fileno(), 1)
    os.dup2(files[1].fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(job["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shim.torture_arm(job.get("root", "").encode(), ctypes.c_long(job.get("k", 0)), job.get("action", 0))
    try:
        if "argv" in job:
            sys.argv = ["mingpt", *job["argv"]]
            cli.main()
        else:
            getattr(calls, job["call"])(*job.get("args", []))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:  # before the command has begun
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    count.value = shim.torture_count()
    return code


def answer(pid: int, files: list, count_file: int, job: dict) -> dict:
    """Wait until a job ends or stops."""
    end = time.monotonic() + job.get("limit_s", 120)
    number, after = job.get("signal", (0, 0))
    signal_at = time.monotonic() + after if number else None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            break
        if signal_at and time.monotonic() > signal_at:
            os.kill(pid, number)
            signal_at = None
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"rc": "hang", "count": 0, "out": "", "err": "the process hangs"}
        time.sleep(0.002)
    if os.WIFSTOPPED(status):
        return {"pid": pid}
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
        file.close()
    count = int(os.pread(count_file, 20, 0) or b"0")
    os.close(count_file)
    return {"rc": os.waitstatus_to_exitcode(status), "count": count, "out": texts[0], "err": texts[1]}


def main() -> None:
    """Serve until standard input ends."""
    faulthandler.enable()
    stopped: dict[int, tuple] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "continue" in job:
            pid, (files, count_file) = job["continue"], stopped.pop(job["continue"])
            os.kill(pid, signal.SIGCONT)
        else:
            files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
            count_file = os.memfd_create("count")
            pid = os.fork()
            if pid == 0:
                count = ctypes.c_long(0)
                code = child(job, files, count)
                os.pwrite(count_file, str(count.value).encode(), 0)
                os._exit(code)
        result = answer(pid, files, count_file, job)
        if "pid" in result:
            stopped[pid] = files, count_file
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
