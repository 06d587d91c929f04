"""`garrulax score`: the log-likelihood and perplexity of a text."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import garrulax as gx
from garrulax.cli.models import load
from garrulax.core.text import whole_characters


def score(args: argparse.Namespace) -> None:
    """Prints the numbers of a text, or with `--json` one object that has them."""
    text = text_of(args)
    model = load(args.model, args.adapter, args.ignore, mesh=args.mesh)
    numbers = numbers_of(gx.perplexity(model, text, window=args.window, stride=args.stride))
    if args.json:
        print(json.dumps(numbers))
    else:
        print("\n".join(f"{name.replace('_', ' '):<16}{_shown(value):>16}" for name, value in numbers.items()))


def numbers_of(found: gx.Perplexity) -> dict[str, Any]:
    """The numbers that the command prints: counts, the negative log-likelihood in nats, and measures made of them."""
    made = ("perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
    return {**dataclasses.asdict(found), **{name: getattr(found, name) for name in made}}


def text_of(args: argparse.Namespace) -> str:
    """The text of a file, or of --text."""
    if (args.file is None) == (args.text is None):
        raise ValueError("give a file, or --text TEXT, and not both")
    if args.text is not None:
        return whole_characters(args.text)
    content = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.file} is not a text in UTF-8: {error.reason} at byte {error.start}") from None


def _shown(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
