"""`garrulax generate` and `garrulax fill`: text, shown as it is made."""

import argparse
import sys

import garrulax as gx
from garrulax.cli.models import find_model


def generate(args: argparse.Namespace) -> None:
    """Continues a text."""
    model = gx.load(find_model(args.model))
    model = model.replace(params=gx.unstack(model.params))
    text = _text(args)
    print(text, end="", flush=True)
    for piece in gx.stream(model, text, stop=tuple(args.stop), **_knobs(args)):
        print(piece, end="", flush=True)
    print()


def fill(args: argparse.Namespace) -> None:
    """Fills the blanks of a text."""
    model = gx.load(find_model(args.model))
    model = model.replace(params=gx.unstack(model.params))
    for piece in gx.fill_stream(model, _text(args), **_knobs(args)):
        print(piece, end="", flush=True)
    print()


def _text(args: argparse.Namespace) -> str:
    return sys.stdin.read() if args.text == "-" else args.text


def _knobs(args: argparse.Namespace) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names}
