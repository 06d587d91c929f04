"""Reads GGUF files, the format of llama.cpp: settings, tokenizer and quantised tensors in one file.

`checkpoint.open_gguf` translates a file into what the rest of the library reads: the Config of a family, its ParamSpec
tree, and stored tensors under the names of the tree. Quantised tensors become float32 while they are read, a block at a
time (`tensors.BlockTensor`); codes that stay quantised in memory would start from the same object.
"""

from pathlib import Path

from garrulax.hub.files import is_file, is_there
from garrulax.hub.gguf.checkpoint import GGUFModel, open_gguf, read_gguf_config
from garrulax.hub.gguf.container import read_container
from garrulax.hub.gguf.tokenizer import read_gguf_tokenizer

__all__ = [
    "GGUFModel",
    "find_gguf",
    "is_gguf",
    "open_gguf",
    "read_container",
    "read_gguf_config",
    "read_gguf_tokenizer",
]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file: by its ending, or by how it begins. Raises as `is_file` does."""
    if not is_file(path):
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without config.json; None if there is none. Of a split model, its first file.

    Raises:
        ValueError: There are several; the message names them.
    """
    if is_there(folder / "config.json"):
        return None
    found = sorted(folder.glob("*.gguf"))
    first = [path for path in found if "-of-" not in path.stem or "-00001-of-" in path.stem]
    if len(first) > 1:
        names = ", ".join(path.name for path in first[:6])
        raise ValueError(f"{folder} has {len(first)} GGUF files ({names}): give the path of one of them")
    return first[0] if first else None
