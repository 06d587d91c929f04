"""`garrulax generate` and `garrulax fill`: print text while it is sampled."""

import argparse
import dataclasses
import sys

import garrulax as gx
from garrulax.cli.models import find_model
from garrulax.sampling.requests import end_tokens


def generate(args: argparse.Namespace) -> None:
    """Continues a text, or answers it with `--chat`."""
    model = gx.load(find_model(args.model), ignore=args.ignore)
    model = model.replace(params=gx.unstack(model.params))
    text = _text(args)
    prompt: str | list[int] = text
    if args.chat:
        model, prompt = _chat(model, text)
    pieces = gx.stream(model, prompt, stop=tuple(args.stop), **_options(args))  # errors come before anything is printed
    if not args.chat:
        print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def fill(args: argparse.Namespace) -> None:
    """Fills the blanks of a text."""
    model = gx.load(find_model(args.model), ignore=args.ignore)
    model = model.replace(params=gx.unstack(model.params))
    for piece in gx.fill_stream(model, _text(args), **_options(args)):
        print(piece, end="", flush=True)
    print()


def _chat(model: gx.Model, text: str) -> tuple[gx.Model, list[int]]:
    """The model with its chat end tokens as eos, and the ids of a conversation with the message `text`."""
    if model.tokenizer is None:
        raise ValueError("--chat needs the model's tokenizer, which its folder lacks")
    if model.tokenizer.chat_format is None and not model.tokenizer.config.get("chat_template"):
        raise ValueError("no chat format is known for this model, and its folder has no template: leave --chat out")
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ends = (*end_tokens(model.config), *model.tokenizer.ends)
    return model.replace(config=dataclasses.replace(model.config, eos=ends)), ids


def _text(args: argparse.Namespace) -> str:
    return sys.stdin.read() if args.text == "-" else args.text


def _options(args: argparse.Namespace) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names}
