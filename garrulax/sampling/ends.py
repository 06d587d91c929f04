"""The ends of a text: end tokens and stop strings."""

import operator
import re
from collections.abc import Sequence
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.text import whole_characters
from garrulax.models.unpack import ModelLike, TokenizerLike


def end_tokens(config: ModelConfig) -> tuple[int, ...]:
    """Ids of the tokens that end a text or the answer to a blank."""
    blanks = models.blanks(config)
    if blanks is not None:
        return blanks.end_tokens
    return config.eos if isinstance(config.eos, tuple) else () if config.eos is None else (config.eos,)


def ends_of(
    model: ModelLike, config: ModelConfig, tokenizer: TokenizerLike | None, given: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Ids of the tokens that end a text, as `generate` describes its argument `end_tokens`.

    Args:
        model: The model; its `generation` may name further ids for a family that fills blanks.
        config: Its Config.
        tokenizer: Its tokenizer, which knows what ends an answer in its chat format.
        given: The argument.

    Raises:
        ValueError: `given` is neither None nor ids of the model.
    """
    if given is not None:
        return _checked(given, config)
    ids = [*end_tokens(config), *getattr(tokenizer, "answer_ends", ())]
    if models.blanks(config) is not None:  # of other families `load` puts these ids into the config
        named = getattr(model, "generation", {}).get("eos_token_id")
        ids += [] if named is None else named if isinstance(named, list) else [named]
    return tuple(i for i in dict.fromkeys(ids) if i < config.vocab)


def _checked(given: Any, config: ModelConfig) -> tuple[int, ...]:
    try:
        ids = tuple(map(operator.index, given if hasattr(given, "__iter__") else (given,)))
    except TypeError:
        raise ValueError(f"end_tokens must be token ids, not {given!r:.60}: texts belong into stop") from None
    if wrong := [i for i in ids if not 0 <= i < config.vocab]:
        raise ValueError(f"end_tokens has token id {wrong[0]}: this model's ids are 0 to {config.vocab - 1}")
    return ids


class StopStrings:
    """Stop strings, in which control tokens may occur. Tokens become text in which these are visible as marks.

    A control token has no text. So that stop strings with a control token can be found, each token that one of them
    spells is shown as a mark: half a character (`core.text`), which the text of a model never contains. A stop string
    is searched for with its control tokens as marks, and as plain text too, since a model may spell a control token.

    Args:
        stop: A text or several.
        tokenizer: The tokenizer of the model, or None.

    Raises:
        ValueError: An empty string, an element that is not a string, or stop strings without a tokenizer.
    """

    def __init__(self, stop: str | Sequence[str] = (), tokenizer: TokenizerLike | None = None):
        if not isinstance(stop, str) and not hasattr(stop, "__iter__"):
            raise ValueError(f"stop must be a text or several, not {stop!r:.60}; () is none")
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        if any(not isinstance(text, str) or not text for text in texts):
            raise ValueError(f"stop must be a text or several, none of them empty, not {stop!r}")
        if texts and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which the model does not have")
        texts = tuple(map(whole_characters, texts))
        specials = getattr(tokenizer, "specials", {})
        names = sorted((name for name in specials if name and any(name in text for text in texts)), key=len)
        marks = {name: chr(0xD800 + i) for i, name in enumerate(reversed(names))}  # longest first
        self._marks = {specials[name]: mark for name, mark in marks.items()}
        found = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        marked = (found.sub(lambda match: marks[match[0]], text) for text in texts)
        self._texts = tuple(dict.fromkeys((*texts, *marked)))
        self._longest = max(map(len, self._texts), default=0)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def mark(self, token: int) -> str:
        """The mark of a control token that a stop string contains; "" for other tokens."""
        return self._marks.get(token, "")

    def visible(self, text: str) -> str:
        """The text without marks."""
        return text if not self._marks else "".join(c for c in text if c not in self._marks.values())

    def find(self, text: str) -> int | None:
        """Index at which the first stop string begins in a text with marks; None if the text contains none."""
        return min((at for at in map(text.find, self._texts) if at >= 0), default=None)

    def final_size(self, text: str) -> int:
        """Length of the text up to its longest ending that is the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._texts):
                return len(text) - size
        return len(text)
