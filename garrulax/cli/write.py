"""`garrulax generate` and `garrulax fill`: print text while it is sampled."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import garrulax as gx
from garrulax.cli.caches import cache_of
from garrulax.cli.models import find_model, load
from garrulax.cli.programs import keep_programs
from garrulax.cli.waiting import waiting
from garrulax.cli.watermarks import watermark_of
from garrulax.core.text import whole_characters
from garrulax.sampling import ahead, compile_ahead
from garrulax.sampling.speculate import Speculation

SAMPLED = (0.8, 0, 0.95)  # the defaults of --temperature, --top-k and --top-p


def generate(args: argparse.Namespace) -> None:
    """Continues a text, or answers it with `--chat`."""
    keep_programs(args.programs)
    try:
        _generate(args)
    finally:
        ahead.cancel()  # after an error or Ctrl-C nobody waits for programs that are not yet being compiled


def _generate(args: argparse.Namespace) -> None:
    text, options, prompt = _text(args), _options(args) | _sampling(args), None
    if args.beams is not None:
        if (args.temperature, args.top_k, args.top_p) != SAMPLED:
            raise ValueError("--beams does not sample: leave --temperature, --top-k and --top-p out")
        options |= {"search": gx.beam(args.beams), "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if args.speculate is not None:
        options["speculate"] = _speculation(args.speculate, args.ignore)
    way = args.speculate or ""
    heads = way.removeprefix("medusa=") if way.startswith("medusa=") else None

    def begin(model: gx.Model) -> None:
        nonlocal prompt
        if heads is not None:
            options["speculate"] = gx.medusa(gx.load_medusa(heads, model))
        prompt = _conversation(model, text) if args.chat else text
        options["cache"] = cache_of(args, model.config)
        if args.beams is None:
            compile_ahead(model, prompt, **options)

    with waiting("reading the model"):
        model = load(args.model, args.adapter, args.ignore, begin, args.mesh)
    with waiting("compiling" if args.beams is None else "searching"):  # errors come before anything is printed
        pieces: Iterator[str]
        if args.beams is None:
            pieces = gx.stream(model, prompt, stop=tuple(args.stop), every=1, **options)
        else:
            pieces = iter([str(gx.generate(model, prompt, stop=tuple(args.stop), **options))])
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


def _sampling(args: argparse.Namespace) -> dict:
    """The further arguments of `gx.generate` that were given on the command line."""
    names = ("min_p", "repetition_penalty", "no_repeat_ngram_size")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    mark = {name: getattr(args, f"watermark_{name}") for name in ("scheme", "gamma", "delta", "context")}
    if args.watermark is not None:
        options["watermark"] = watermark_of(args.watermark, "--watermark-", **mark)
    elif alone := [name for name, value in mark.items() if value is not None]:
        raise ValueError(f"--watermark-{alone[0]} needs a key: --watermark KEY")
    if args.json_schema is not None:
        options["constrain"] = gx.json_schema(Path(args.json_schema).read_text(encoding="utf-8"))
    if args.regex is not None:
        options["constrain"] = gx.regex(args.regex)
    return options


def _speculation(way: str, ignore: list[str]) -> Speculation | None:
    """The value of `--speculate`; None for Medusa heads."""
    if way == "lookup":
        return gx.prompt_lookup()
    if not way:
        raise ValueError("--speculate needs a way: lookup, layers=N, medusa=FOLDER or a model")
    name, _, value = way.partition("=")
    if name == "medusa":
        if not value:
            raise ValueError(f"--speculate {way}: medusa= needs a folder of heads, such as medusa=heads")
        return None  # the heads are read when the model's config is known
    if name != "layers":
        return gx.draft(gx.load(find_model(way), ignore=ignore))
    if not value.isdecimal():
        raise ValueError(f"--speculate {way}: layers= needs a number of layers, such as layers=8")
    return gx.draft(layers=int(value))


def fill(args: argparse.Namespace) -> None:
    """Fills the blanks of a text."""
    keep_programs(args.programs)
    with waiting("reading the model"):
        model = load(args.model, args.adapter, args.ignore, mesh=args.mesh)
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
