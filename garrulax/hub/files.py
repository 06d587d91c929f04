"""Files of a model folder: whether they are there, and their text. Every fault is an error that names the file."""

import errno
import os
from pathlib import Path


def is_there(path: Path) -> bool:
    """Whether a path exists.

    A link to nothing is an error, where `Path.exists` says that there is nothing: the folder should have this file, and
    whoever skips it reads another one in its place.

    Raises:
        FileNotFoundError: It is a link that leads to nothing or back to itself; the message says what to do.
    """
    try:
        path.stat()
    except OSError as error:
        if path.is_symlink():
            raise FileNotFoundError(_broken_link(path, error)) from None
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether a path is a file, or a link to one. Raises FileNotFoundError as `is_there` does."""
    return is_there(path) and path.is_file()


def _broken_link(path: Path, error: OSError) -> str:
    target = os.readlink(path)
    if error.errno == errno.ELOOP:
        return f"{path} is a link to {target}, which leads back to it: put the file itself there"
    if error.errno == errno.EACCES:
        return f"{path} is a link to {target}, which this user may not read"
    if path.absolute().parent.parent.name == "snapshots":  # models--org--name/snapshots/REVISION of huggingface_hub
        name = path.absolute().parents[2].name.removeprefix("models--").replace("--", "/")
        return (
            f"{path} is a link to {target}, which is missing in the cache of the hub: download the model again "
            f"(`hf download {name}`)"
        )
    return f"{path} is a link to {target}, which is missing: put the file there, or copy or download the folder again"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises ValueError, with the file's name, for other text.

    Line ends are as Python reads them: all of them become a line feed.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
