"""Floor 5: the command `garrulax`, which wires the rooms below."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

USAGE_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FAILURES = (OSError, ArithmeticError, RuntimeError, MemoryError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 for a failure, 2 for what the user has to change, 130 for Ctrl-C.

    Errors are one line on stderr; `--traceback` shows where they came from.
    """
    args = _parse(argv)
    try:
        _command(args.command)(args)
    except USAGE_ERRORS as error:
        return _explain(error, args, 2)
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stderr.close()
        return 1
    except FAILURES as error:
        return _explain(error, args, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse wants all of a list of positionals in one place; settings may stand before and after options.
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "train" and not any(word.startswith("-") for word in rest):
        args.settings += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _explain(error: Exception, args: argparse.Namespace, code: int) -> int:
    if args.traceback:
        raise error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"garrulax {args.command}: {lines[0]}", file=sys.stderr)
    return code


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    # Each command imports what it needs, so that --help is instant.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if name == "train":
        from garrulax.cli.train import train

        return train
    if name == "info":
        from garrulax.cli.info import info

        return info
    if name == "glitch":
        from garrulax.cli.glitch import glitch

        return glitch
    if name == "convert":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it needs no device
        from garrulax.cli.convert import convert

        return convert
    from garrulax.cli import write

    return write.generate if name == "generate" else write.fill


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="garrulax", description="Language models in JAX: train, write, fill, inspect, convert."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model on text",
        description="Train a model on text. Settings are key=value, such as steps=500 model.layers=6; "
        "`garrulax train --list` shows them all.",
    )
    train.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings; a word without = is the preset")
    train.add_argument("--run", metavar="FOLDER", help="where the run is kept (default runs/PRESET)")
    train.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    train.add_argument("--config", metavar="FILE", help="settings from a TOML file")
    train.add_argument("--mesh", metavar="AXES", help="devices by name, such as fsdp=4,tensor=2")
    train.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="be process I of N that meet at HOST:PORT; on a TPU pod or under SLURM without a value",
    )
    train.add_argument("--list", action="store_true", help="show all settings with their defaults, and stop")

    generate = commands.add_parser(
        "generate", help="continue a text", description="Continue a text, shown as it is made."
    )
    _add_writing(generate)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument("--chat", action="store_true", help="the text is a message to a chat model: show its answer")
    fill = commands.add_parser(
        "fill", help="fill the [MASK]s of a text (GLM)", description="Fill every [MASK], [sMASK] and [gMASK] of a text."
    )
    _add_writing(fill)

    info = commands.add_parser(
        "info", help="describe a preset or a model folder", description="What a model is and costs."
    )
    info.add_argument("model", help="a preset (garrulax info --all lists them), a model folder or a run", nargs="?")
    info.add_argument("--all", action="store_true", help="list the presets")
    glitch = commands.add_parser(
        "glitch",
        help="list the tokens that training never met",
        description="List the tokens whose embeddings training left alone, most suspect first.",
    )
    glitch.add_argument("model", help="a run, a Hugging Face model folder, or a name on its hub")
    glitch.add_argument("--top", type=int, default=20, metavar="N", help="list so many (20)")
    glitch.add_argument("--side", choices=("input", "output"), help="look at one table only")
    glitch.add_argument("--plot", metavar="FILE", help="draw the scores to this picture, such as glitch.png")
    convert = commands.add_parser(
        "convert",
        help="write a model folder as another",
        description="Write the model of one folder to another, tensor by tensor: memory holds one of them.",
    )
    convert.add_argument("source", metavar="SRC", help="a Hugging Face model folder, a run, or a name on the hub")
    convert.add_argument("target", metavar="DST", help="the folder to write; an older model there is replaced")
    convert.add_argument("--dtype", help="of all tensors: float32, bfloat16, float16 (as stored)")
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file, such as 200MB (5GB)")
    convert.add_argument("--dialect", help="format of the checkpoint where the family has several, such as glm")
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_writing(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a run, a Hugging Face model folder, or a name on its hub")
    command.add_argument("text", help="the text; - reads it from stdin")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each answer (128)")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (0.8)")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest; 0 is all (0)")
    command.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="among those with this probability (0.95)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (0)")
