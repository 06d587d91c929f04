"""The README.md of a model folder: a stub that states only facts that are known from the files."""

import shutil
import zlib
from pathlib import Path

import garrulax
from garrulax.core.config import ModelConfig
from garrulax.models import count, family

CARD = "README.md"
_MARK = "<!-- An untouched stub, replaced when Garrulax writes here again; once edited it stays. "


def card_text(config: ModelConfig, dtype: str, origin: str) -> str:
    """The text of the stub.

    Args:
        config: Configuration of the model.
        dtype: Dtype of its parameters.
        origin: How its files came about, such as "written by `garrulax.save`".
    """
    module = family(config)
    raw = module.to_hf(config)
    body = f"""---
license: unknown
tags:
- garrulax
---

# {raw["architectures"][0]}

A model of the {module.__name__.rsplit(".", 1)[-1]} family (model_type `{raw["model_type"]}`) with {count(config):,} \
parameters in {dtype}. Its files were {origin} (Garrulax {garrulax.__version__}).

This card is a stub. Where the weights come from, what they were trained on, under which license they are and what
they should not be used for is not recorded here: whoever publishes them should say so.

"""
    return f"{body}{_MARK}{_checksum(body)} -->\n"


def is_unedited_stub(path: Path) -> bool:
    """Whether a file is a stub that Garrulax wrote and nobody has edited."""
    body, mark, end = path.read_bytes().decode("utf-8", "replace").rpartition(_MARK)
    return bool(mark) and end == f"{_checksum(body)} -->\n"


def write_card(old: Path, new: Path, text: str) -> None:
    """Writes the card of the folder `new`, which replaces `old`: a card in `old` that somebody edited, else `text`."""
    if (old / CARD).exists() and not is_unedited_stub(old / CARD):
        shutil.copy2(old / CARD, new / CARD)
    else:
        (new / CARD).write_text(text, encoding="utf-8")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
