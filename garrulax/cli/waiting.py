"""A line in the terminal while a command waits."""

import contextlib
import sys
import threading
from collections.abc import Iterator

DELAY = 0.5  # seconds after which it is shown


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows `what ...` on stderr while the body runs, if that takes long and stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    text = f"{what} ..."
    shown = threading.Event()

    def show() -> None:
        shown.set()
        print(text, end="", file=sys.stderr, flush=True)

    timer = threading.Timer(DELAY, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if shown.is_set():
            print("\r" + " " * len(text) + "\r", end="", file=sys.stderr, flush=True)
