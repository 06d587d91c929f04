"""Ending a run in good order when it is told to: Ctrl-C, SIGTERM, a preempted machine."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a question to ask after every step; a second SIGINT aborts at once.

    With several processes all of them stop after the same step, whichever was told: JAX's preemption service, which
    listens to SIGTERM, agrees on it, and SIGINT is passed on to it. Use as a context manager, in the main thread
    (elsewhere signals are left alone).
    """

    def __init__(self):
        self.received = False
        self._many = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM)
            self._before = {s: signal.signal(s, self._handle) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def stop_after(self, step: int) -> bool:
        """Whether to stop after `step`; every process must ask after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._many else self.received

    def _handle(self, which: int, _: object) -> None:
        if self.received and which == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
