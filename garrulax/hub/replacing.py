"""Replaces a folder by a new one at once, and removes what processes that died left beside it."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from garrulax.core.disk import sync

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextlib.contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A new hidden folder beside `folder`. It replaces `folder` if the block succeeds, and is removed if it raises.

    Where the system can exchange two folders (Linux), there is no moment without a folder. Elsewhere there is one; if
    a process dies in it, the next call puts the older folder back. The hidden folder is locked while its process lives,
    so that the next call can tell which ones a dead process left, and remove them.

    Args:
        folder: Absolute path.
        check: Called with `folder` before and after the block; raises if it must not be replaced.

    Raises:
        ValueError: If `folder` is a mount point; and what `check` raises.
        OSError: If the folder cannot be written; the message names it.
    """
    _put_back(folder)
    check(folder)
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced: choose a folder in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    with contextlib.ExitStack() as locks:
        temporary = _new(folder, locks)
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            check(folder)
            _swap(temporary, folder, locks)
            sync(folder.parent)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(f"{folder} cannot be written: {error.strerror}; what was there before is intact") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _new(folder: Path, locks: contextlib.ExitStack) -> Path:
    while True:
        path = _beside(folder, "new")
        path.mkdir()
        if _locked(path, locks):
            return path


def _swap(temporary: Path, folder: Path, locks: contextlib.ExitStack) -> None:
    """Gives `temporary` the name `folder`. The older folder, if there is one, has the name `temporary` or is gone."""
    if not folder.exists():
        temporary.rename(folder)
    elif not _exchanged(temporary, folder):
        old = _beside(folder, "old")
        _locked(folder, locks)
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders; False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _left(folder: Path, kind: str) -> list[Path]:
    """The hidden folders beside `folder` that no living process holds."""
    hidden = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.{kind}")
    found = [p for p in folder.parent.iterdir() if hidden.fullmatch(p.name)] if folder.parent.is_dir() else []
    left = []
    for path in found:
        with contextlib.ExitStack() as locks:
            if _locked(path, locks):
                left.append(path)
    return left


def _put_back(folder: Path) -> None:
    """Gives an older folder its name again, if a process died between taking it and giving it to the new one."""
    if not folder.exists():
        for path in _left(folder, "old")[:1]:
            path.rename(folder)


def _clean(folder: Path) -> None:
    for path in [*_left(folder, "new"), *_left(folder, "old")]:
        shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path, locks: contextlib.ExitStack) -> bool:
    """Locks a folder until `locks` ends, or until this process does. False if another holds the lock or removed it."""
    try:
        number = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    locks.callback(os.close, number)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(number), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
