"""The options --cache, --kv and --offload: what is kept of a text, and where."""

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
        ValueError: --cache is none of its forms, a number is wrong, or --offload does not go with it.
    """
    text = args.cache
    stream = getattr(args, "stream", False)
    if args.offload and text.partition("=")[0] != "blocks":
        given = "--stream" if stream else text
        raise ValueError(f"--offload keeps blocks in the host's memory: it goes with --cache blocks, not {given}")
    if stream:
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
        raise ValueError(f"--cache {text}: it must be one of {FORMS}; --kv int8 is for 8 bits")
    options = {"offload": True} if args.offload else {}
    return make(*map(int, words), dtype=args.kv, **options)
