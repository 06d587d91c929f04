"""The progress of a run on the terminal: one line that is updated in place, or plain lines in a log file."""

import os
import sys
import time
from typing import TextIO

import jax

PLAIN_EVERY = 10.0  # seconds between plain lines, to keep log files short


def write(text: str, out: TextIO | None = None) -> bool:
    """Writes a text at once, to stderr by default. If nobody can read it any more, it is dropped: no error, but False.

    A run must not end because the reader of its progress did, such as `head`, or a terminal that was closed.
    """
    out = sys.stderr if out is None else out
    try:
        if out is not None:
            out.write(text)
            out.flush()
            return True
    except (OSError, ValueError):  # a closed pipe, a full disk; a file that is closed
        if out is sys.stderr:
            _discard_stderr()
    return False


def _discard_stderr() -> None:
    """Sends stderr to the null device, so that no write to it fails, not even when Python exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        sys.stderr = None


class StepTimer:
    """Measures the time of training steps, without compilation, evaluation and saving.

    Call `begin` once, after the first step; `stop` and `start` around work that is not to be measured; and `lap` at
    the end of every interval.

    Attributes:
        per_step: Seconds per step, a moving average over the intervals; None before the first.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._last_step = 0
        self.per_step: float | None = None

    def begin(self, step: int) -> None:
        """Starts to measure the steps after `step`."""
        self._last_step = step
        self.start()

    def start(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def lap(self, step: int) -> float | None:
        """Seconds per step since the last lap or `begin`; None if there was no step."""
        self.stop()
        steps, self._last_step = step - self._last_step, step
        seconds, self._seconds = self._seconds, 0.0
        self.start()
        if steps <= 0:
            return None
        new = seconds / steps
        self.per_step = new if self.per_step is None else 0.8 * self.per_step + 0.2 * new
        return new


class Progress:
    """Writes the progress of a run. Only the first process writes.

    Args:
        steps: Of the whole run.
        tokens: In one step.
        flops: Of one token, forward and backward pass.
        peak: FLOP/s of all devices together; None if unknown.
        out: Where to write; None is stderr.
    """

    def __init__(self, steps: int, tokens: int, flops: int, peak: float | None, out: TextIO | None = None):
        self._steps, self._tokens, self._flops, self._peak = steps, tokens, flops, peak
        self._out = sys.stderr if out is None else out
        self._live = _is_terminal(self._out)
        self._quiet = jax.process_index() != 0
        self._shown, self._last = False, 0.0

    def update(self, step: int, loss: float, lr: float, seconds: float | None) -> None:
        """Shows the latest step.

        Args:
            step: Its number.
            loss: Nats per token.
            lr: Learning rate.
            seconds: Per step; None if not known yet.
        """
        now = time.perf_counter()
        if self._quiet or (not self._live and now - self._last < PLAIN_EVERY):
            return
        self._last = now
        line = f"step {step:,}/{self._steps:,}  loss {loss:.4f}  lr {lr:.1e}"
        if seconds:
            line += f"  {self.rates(seconds)}  {duration((self._steps - step) * seconds)} left"
        self._write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        self._shown = self._live

    def rates(self, seconds: float) -> str:
        """Tokens/s, model FLOP/s and, if the peak is known, model FLOPs utilisation of a step that takes `seconds`."""
        speed = self._tokens / seconds
        mfu = f" (MFU {speed * self._flops / self._peak:.1%})" if self._peak else ""
        return f"{si(speed)} tokens/s  {si(speed * self._flops)}FLOP/s{mfu}"

    def say(self, text: str) -> None:
        """Writes a line that later updates do not overwrite."""
        if self._quiet:
            return
        self._write(f"\r\x1b[K{text}\n" if self._shown else f"{text}\n")
        self._shown = False

    def close(self) -> None:
        """Ends the line that was updated in place."""
        if self._shown:
            self._write("\n")
            self._shown = False

    def _write(self, text: str) -> None:
        self._quiet = self._quiet or not write(text, self._out)


def _is_terminal(out: TextIO | None) -> bool:
    try:
        return out is not None and out.isatty()
    except ValueError:  # it is closed
        return False


def si(value: float) -> str:
    """Formats a number with three digits and a metric prefix: 12.3 k, 4.56 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Formats seconds as 0:42, 12:34 or 3:02:01."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
