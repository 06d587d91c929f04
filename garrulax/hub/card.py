"""The README.md of a model folder: a stub that claims nothing it cannot know."""

import shutil
import zlib
from pathlib import Path
from typing import Any

import garrulax
from garrulax.models import count, family

CARD = "README.md"
_MARK = "<!-- An untouched stub, replaced when Garrulax writes here again; once edited it stays. "


def card(config: Any, dtype: str, made: str) -> str:
    """The text for a model of `config` in `dtype`; `made` says how its files came about."""
    module = family(config)
    raw = module.to_hf(config)
    body = f"""---
license: unknown
tags:
- garrulax
---

# {raw["architectures"][0]}

A model of the {module.__name__.rsplit(".", 1)[-1]} family (model_type `{raw["model_type"]}`) with {count(config):,} \
parameters in {dtype}. Its files were {made} (Garrulax {garrulax.__version__}).

This card is a stub. Where the weights come from, what they were trained on, under which license they are and what
they should not be used for is not recorded here: whoever publishes them should say so.

"""
    return f"{body}{_MARK}{_checksum(body)} -->\n"


def untouched(path: Path) -> bool:
    """Whether a file is a stub of ours that nobody has edited."""
    body, mark, end = path.read_bytes().decode("utf-8", "replace").rpartition(_MARK)
    return bool(mark) and end == f"{_checksum(body)} -->\n"


def write_card(old: Path, new: Path, text: str) -> None:
    """The card of the folder `new`, which takes the place of `old`: somebody's own card in `old`, or else `text`."""
    if (old / CARD).exists() and not untouched(old / CARD):
        shutil.copy2(old / CARD, new / CARD)
    else:
        (new / CARD).write_text(text, encoding="utf-8")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
