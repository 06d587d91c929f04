"""Files in object stores, such as gs://bucket/folder or s3://bucket/*.jsonl, through fsspec."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


def files(url: str) -> list[str]:
    """Lists the URLs of one file, of the files in a folder (but hidden ones), or of all that match a pattern; sorted.

    Args:
        url: With a protocol that fsspec knows.

    Raises:
        ImportError: If fsspec, or the package for this protocol, is not installed; it says what to install.
        ValueError: If fsspec does not know the protocol.
    """
    system, path = _system(url)
    if any(sign in path for sign in "*?["):
        found = [name for name in system.glob(path) if system.isfile(name)]
    elif system.isfile(path):
        return [url]
    else:
        inside = system.find(path) if system.exists(path) else []
        found = [name for name in inside if not any(part.startswith(".") for part in name[len(path) :].split("/"))]
    return sorted(str(system.unstrip_protocol(name)) for name in found)


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """Opens a file to read its bytes as a stream; it is never copied whole to this machine. Raises as `files` does."""
    system, path = _system(url)
    with system.open(path, "rb") as stream:
        yield stream


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{url} is read through fsspec: pip install 'garrulax[fsspec]'") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package for a protocol is missing; there is no such protocol
        raise type(error)(f"{url} cannot be read: {error}") from error
    return system, path
