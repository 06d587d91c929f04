"""Processes that train together watch each other, so that one that dies is named within seconds.

Without this, the others wait in a collective operation until JAX's own heartbeat ends them, after a minute or more and
without a word about the run. Every process keeps a connection to process 0 and sends a byte every second. A connection
that ends without a message, or that is silent for ten seconds, means that the other process is gone.
"""

import contextlib
import os
import secrets
import shlex
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from garrulax.train.checkpoint import saved_steps
from garrulax.train.progress import write

#: Exit code of a process that ends because another one died (EX_TEMPFAIL of sysexits.h: try again).
PEER_DIED = 75
_BEAT, _SILENCE = 1.0, 10.0  # seconds between bytes, and without a byte
_CONNECTING = 20.0  # seconds to connect
_OWN_ERROR = 3.0  # seconds that a process has to end with an error of its own when another one did
_CAUSE = 1.0  # seconds in which an error of this process may turn out to come from the death of another
_ALIVE, _BYE, _FAILED, _DIED = b"a", b"b", b"f", b"d"
_watching = False


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Watches the other processes. If one dies, says so and ends this process with the exit code `PEER_DIED`.

    All processes must call this at the same time. With one process, and inside of another such block, it does nothing.

    Args:
        folder: Of the run, to say how to resume it.
    """
    global _watching
    if jax.process_count() == 1 or _watching:
        yield
        return

    def died(process: int) -> None:
        steps = saved_steps(folder / "checkpoints")
        saved = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was saved yet"
        write(f"garrulax train: process {process} of {jax.process_count()} ended or cannot be reached; {saved}. Start "
              f"all processes again with: garrulax train --resume {shlex.quote(str(folder))}\n")  # fmt: skip
        os._exit(PEER_DIED)  # the main thread may wait for the dead process for ever

    watch, _watching = _Watch(died), True
    try:
        yield
        watch.close(_BYE)
    except BaseException:
        time.sleep(_CAUSE)  # a collective operation fails at once when a process dies: then `died` ends this one
        watch.close(_FAILED)
        raise
    finally:
        _watching = False


class _Watch:
    """The connections to process 0, or of process 0 to all others, and a thread for each."""

    def __init__(self, died: Callable[[int], None]):
        self._died, self._ending = died, threading.Event()
        self._connections: dict[int, socket.socket] = _star()
        self._threads = [
            threading.Thread(target=run, args=item, daemon=True)
            for item in self._connections.items()
            for run in (self._listen, self._beat)
        ]
        for thread in self._threads:
            thread.start()

    def close(self, message: bytes) -> None:
        """Tells the others that this process ends: as it should, or with an error that it explains itself."""
        self._ending.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(message)

    def _beat(self, _: int, connection: socket.socket) -> None:
        while not self._ending.wait(_BEAT):
            with contextlib.suppress(OSError):
                connection.sendall(_ALIVE)

    def _listen(self, process: int, connection: socket.socket) -> None:
        connection.settimeout(_SILENCE)
        gone = process
        while True:
            try:
                received = connection.recv(64)
            except OSError:
                received = b""
            if _DIED in received:  # process 0 tells which one
                gone = struct.unpack("<i", (received.partition(_DIED)[2] + bytes(4))[:4])[0]
                break
            if _BYE in received:
                return
            if _FAILED in received:
                self._ending.wait(_OWN_ERROR)
                break
            if not received:
                break
        if self._ending.is_set():
            return
        for other, to in self._connections.items():
            if other != gone:
                with contextlib.suppress(OSError):
                    to.sendall(_DIED + struct.pack("<i", gone))
        self._died(gone)


def _star() -> dict[int, socket.socket]:
    """Connects every process with process 0. Returns the connections by the index of the process at the other end."""
    first = jax.process_index() == 0
    server = _server() if first else None
    port = server.getsockname()[1] if server is not None else 0
    values = multihost_utils.broadcast_one_to_all(np.array([port, secrets.randbits(31)], np.int32))
    port, token = (int(value) for value in values)
    try:
        return _connect(port, token) if server is None else _accept(server, token)
    except OSError as error:
        write(f"garrulax train: processes cannot watch each other on port {port} ({error}); JAX notices one that dies "
              "after a minute or two\n")  # fmt: skip
        return {}


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=jax.process_count(), dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=jax.process_count())


def _connect(port: int, token: int) -> dict[int, socket.socket]:
    from jax._src import distributed  # JAX has no public name for the address of process 0

    host = str(distributed.global_state.coordinator_address).rsplit(":", 1)[0].strip("[]")
    connection = socket.create_connection((host, port), timeout=_CONNECTING)
    connection.sendall(struct.pack("<ii", token, jax.process_index()))
    return {0: connection}


def _accept(server: socket.socket, token: int) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    server.settimeout(_CONNECTING)
    with server:
        while len(connections) < jax.process_count() - 1:
            connection, _ = server.accept()
            connection.settimeout(_CONNECTING)
            said = connection.recv(8, socket.MSG_WAITALL)
            if len(said) == 8 and struct.unpack("<ii", said)[0] == token:
                connections[struct.unpack("<ii", said)[1]] = connection
            else:
                connection.close()  # not a process of this run
    return connections
