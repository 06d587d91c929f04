"""`garrulax generate` and `garrulax fill`: print text while it is sampled."""

import argparse
import sys

import garrulax as gx
from garrulax.cli.models import find_model
from garrulax.core.text import whole_characters


def generate(args: argparse.Namespace) -> None:
    """Continues a text, or answers it with `--chat`."""
    model = gx.load(find_model(args.model), ignore=args.ignore)
    model = model.replace(params=gx.unstack(model.params))
    text = _text(args)
    prompt = _conversation(model, text) if args.chat else text
    pieces = gx.stream(model, prompt, stop=tuple(args.stop), **_options(args))  # errors come before anything is printed
    if not args.chat:
        if model.tokenizer is not None and model.tokenizer.has_chat_format:
            print(
                "garrulax generate: this model has a chat format, and the text is continued as it is: "
                "add --chat to send it as a message",
                file=sys.stderr,
            )
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


def _conversation(model: gx.Model, text: str) -> list[int]:
    """The ids of a conversation with the message `text`."""
    if model.tokenizer is None:
        raise ValueError("--chat needs the model's tokenizer, which its folder lacks")
    if not model.tokenizer.has_chat_format:
        raise ValueError("no chat format is known for this model, and its folder has no template: leave --chat out")
    return model.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def _text(args: argparse.Namespace) -> str:
    return whole_characters(sys.stdin.read() if args.text == "-" else args.text)


def _options(args: argparse.Namespace) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names}
