"""`garrulax generate` and `garrulax fill`: print text while it is sampled."""

import argparse
import sys

import garrulax as gx
from garrulax.cli.models import find_model
from garrulax.cli.programs import keep_programs
from garrulax.cli.waiting import waiting
from garrulax.core.text import whole_characters
from garrulax.sampling import compile_ahead


def generate(args: argparse.Namespace) -> None:
    """Continues a text, or answers it with `--chat`."""
    keep_programs(args.cache)
    text, options, prompt = _text(args), _options(args), None

    def begin(model: gx.Model) -> None:
        nonlocal prompt
        prompt = _conversation(model, text) if args.chat else text
        compile_ahead(model, prompt, **options)

    with waiting("reading the model"):
        model = gx.load(find_model(args.model), ignore=args.ignore, while_reading=begin)
    # Errors of the arguments come before anything is printed.
    pieces = gx.stream(model, prompt, stop=tuple(args.stop), every=1, **options)
    with waiting("compiling"):
        first = next(pieces, "")
    if not args.chat:
        if model.tokenizer is not None and model.tokenizer.has_chat_format:
            print(
                "garrulax generate: this model has a chat format, and the text is continued as it is: "
                "add --chat to send it as a message",
                file=sys.stderr,
            )
        print(text, end="", flush=True)
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def fill(args: argparse.Namespace) -> None:
    """Fills the blanks of a text."""
    keep_programs(args.cache)
    with waiting("reading the model"):
        model = gx.load(find_model(args.model), ignore=args.ignore)
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
