"""Signals that ask a training run to stop: it finishes its iteration and saves before it obeys."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals(contextlib.AbstractContextManager):
    """Notes the first SIGINT, SIGTERM or SIGHUP while it is entered; a second one does what it did before.

    One that is ignored, as nohup has it, stays ignored. Only the main thread of a process gets signals.

    Attributes:
        received: the number of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
