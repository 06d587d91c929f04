"""A lock that keeps a second training out of the folder of a run."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from garrulax.train.progress import write

NAME = "lock"
_held: set[Path] = set()


class FolderInUseError(OSError):
    """Another training works in the folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which is made if it does not exist.

    Process 0 holds the lock; the operating system releases it when the process ends, however it ends. With several
    processes all must call this at the same time. Within the block, a second call for the same folder does nothing.

    Args:
        folder: Of the run. If nothing but the lock is in it at the end, it is removed.

    Raises:
        FolderInUseError: If another training holds the lock; the message names its process.
    """
    folder = Path(folder).absolute()
    if folder in _held:
        yield
        return
    refused = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(_locked(folder))
            except FolderInUseError as error:
                refused = error
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(refused is not None)):
            refused = refused or FolderInUseError(f"{folder} is in use by another training")
        if refused is not None:
            raise refused
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    existed = folder.exists()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(number, 200, 0).decode(errors="replace").strip() or "of an unknown process"
            os.close(number)
            raise FolderInUseError(
                f"{folder} is in use by the training {owner}: wait until it ends, stop it, or choose another folder"
            ) from None
        except OSError as error:  # such as a network file system without locks
            write(f"{folder} cannot be locked ({error.strerror}): make sure that no other training works in it\n")
        if _is_at(number, folder / NAME):
            break
        os.close(number)  # whoever held it has removed the file
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # a full disk: the lock holds without the name of its owner
        pass
    try:
        yield
    finally:
        if not existed and [file.name for file in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(number)


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False
