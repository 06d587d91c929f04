"""A run saves and stops when it is interrupted: by Ctrl-C, SIGTERM, a closed terminal, or a preempted machine."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")


class Stopped(Exception):
    """An evaluation was left because the run is to stop."""


class Interrupts:
    """Catches SIGINT, SIGTERM and SIGHUP, for the loop to ask about after every step. A second SIGINT aborts at once.

    SIGHUP stays ignored where it was ignored, such as under nohup. With several processes, all of them stop after the
    same step, whichever got the signal: JAX's preemption service listens to SIGTERM and chooses the step, and the other
    signals are passed on to it as SIGTERM.

    Use as a context manager in the main thread; in other threads it does not touch signals.
    """

    def __init__(self):
        self.received = False
        self._several_processes = jax.process_count() > 1
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            caught = [signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                caught.append(signal.SIGHUP)
            if not self._several_processes:
                caught.append(signal.SIGTERM)
            self._old_handlers = {s: signal.signal(s, self._handle) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def stop_after(self, step: int) -> bool:
        """Whether to stop after `step`. Every process must call this after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several_processes else self.received

    def until_received(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes: then it raises Stopped. With several processes, which must agree, all."""
        for item in items:
            if self.received and not self._several_processes:
                raise Stopped
            yield item

    def _handle(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._several_processes:
            os.kill(os.getpid(), signal.SIGTERM)
