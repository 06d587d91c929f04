"""The options --cache and --kv: what is kept of a text."""

import argparse
from collections.abc import Callable

import garrulax as gx
from garrulax.core.config import ModelConfig
from garrulax.layers.cache_kinds import Kind

SINKS = 4  # first tokens that --stream keeps, as many as in the paper
FORMS = "full, window=N, sinks=FIRST,N, blocks, or blocks=SIZE,TOP,FIRST,LOCAL,REPRESENTATIVES"
_MAKE: dict[str, tuple[Callable[..., Kind], int, int]] = {  # with the least and the greatest number of numbers
    "window": (gx.window, 1, 1),
    "sinks": (gx.sinks, 2, 2),
    "blocks": (gx.blocks, 0, 5),
}


def cache_of(args: argparse.Namespace, config: ModelConfig) -> str | Kind:
    """The argument `cache` of `gx.generate` that the options mean.

    Raises:
        ValueError: --cache is none of its forms, or a number is wrong.
    """
    text = args.cache
    if getattr(args, "stream", False):
        if text != "full":
            raise ValueError(f"--stream keeps {SINKS} first tokens and a window: leave it or --cache {text} out")
        if config.max_length <= 2 * SINKS:
            raise ValueError(f"--stream needs a context of more than {2 * SINKS} tokens, not {config.max_length}")
        text = f"sinks={SINKS},{config.max_length - SINKS}"
    if text == "full":
        return args.kv or "full"
    name, _, numbers = text.partition("=")
    words = numbers.split(",") if numbers else []
    make, least, most = _MAKE.get(name, (gx.window, 1, 0))
    if not least <= len(words) <= most or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--cache {text}: it must be one of {FORMS}")
    return make(*map(int, words), dtype=args.kv)
