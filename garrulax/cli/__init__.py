"""The command `garrulax`: reads arguments, calls the other packages, prints."""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

USAGE_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FAILURES = (OSError, ArithmeticError, RuntimeError, MemoryError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. An error is one line on stderr; with `--traceback` it is raised.

    Args:
        argv: The words after `garrulax`; None takes them from the command line.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C.
    """
    # Modules, vocabularies and programs are a million objects that stay: the collector would look through them often.
    gc.set_threshold(100_000, 20, 20)
    _open_standard_streams()
    args = _parse(argv)
    try:
        _command("align" if args.command == "train" and _aligns(args) else args.command)(args)
    except USAGE_ERRORS as error:
        return _explain(error, args, 2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        sys.stderr.close()
        return 1
    except FAILURES as error:
        return _explain(error, args, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _open_standard_streams() -> None:
    """Opens streams that are closed (`2>&-`) to nothing: else the next file takes the number of stderr."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse accepts a list of positionals in one place only, but settings may come before and after options.
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in ("train", "align", "info", "plan") and not any(word.startswith("-") for word in rest):
        args.settings += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _explain(error: Exception, args: argparse.Namespace, code: int) -> int:
    if args.traceback:
        raise error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    with contextlib.suppress(OSError):
        print(f"garrulax {args.command}: {lines[0]}", file=sys.stderr)
    return code


def _aligns(args: argparse.Namespace) -> bool:
    """Whether `garrulax train` is to do what `garrulax align` does."""
    return bool(args.sft) or bool(args.resume and os.path.exists(os.path.join(args.resume, "align.json")))


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    # Each command imports its modules here, so that --help starts at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if name == "train":
        from garrulax.cli.train import train

        return train
    if name == "align":
        from garrulax.cli.align import align

        return align
    if name == "info":
        from garrulax.cli.info import info

        return info
    if name == "plan":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it compiles for chips that are not there
        from garrulax.cli.plan import plan

        return plan
    if name == "glitch":
        from garrulax.cli.glitch import glitch

        return glitch
    if name == "score":
        from garrulax.cli.score import score

        return score
    if name == "detect":
        from garrulax.cli.detect import detect

        return detect
    if name == "report":
        from garrulax.cli.report import report

        return report
    if name == "convert":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it needs no accelerator
        from garrulax.cli.convert import convert

        return convert
    if name == "merge":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from garrulax.cli.merge import merge

        return merge
    if name == "chat":
        from garrulax.cli.chat import chat

        return chat
    from garrulax.cli import write

    return write.generate if name == "generate" else write.fill


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="garrulax",
        description="Language models in JAX: train, align, plan, generate, fill, chat, score, detect, inspect, "
        "convert, merge, report.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model on text",
        description="Train a model on text. Settings are written as KEY=VALUE, such as steps=500 model.layers=6; "
        "`garrulax train --list` explains all of them.",
    )
    train.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="a setting; a word without = is the model: a preset, or a folder, GGUF file, run or hub name with weights",
    )
    train.add_argument("--run", metavar="FOLDER", help="folder for the run (default: runs/PRESET)")
    train.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    train.add_argument("--new-data", action="store_true", help="with --resume: go on although the text is another one")
    train.add_argument("--config", metavar="FILE", help="read settings from this TOML file")
    train.add_argument("--mesh", metavar="AXES", help="use several devices, by axis: such as fsdp=4,tensor=2")
    train.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="run as process I of N; HOST:PORT is the address of process 0; no value on a TPU pod or under SLURM",
    )
    train.add_argument("--list", action="store_true", help="show all settings and their defaults, then stop")
    train.add_argument(
        "--lora",
        metavar="NAME=VALUE,...",
        help="train a LoRA adapter and leave the weights of the model as they are, such as rank=16 or "
        "rank=8,alpha=16,targets=query+value,dora=true (docs/lora.md)",
    )
    train.add_argument(
        "--medusa",
        action="store_true",
        help="train Medusa heads for a model that stays as it is, and save them in --run (docs/medusa.md)",
    )
    train.add_argument("--heads", type=int, metavar="K", help="with --medusa, number of heads (4)")
    train.add_argument(
        "--choices", type=int, metavar="N", help="with --medusa, let the heads choose from the N most frequent tokens"
    )

    train.add_argument(
        "--sft",
        metavar="FILE",
        help="train on the answers in conversations, JSON lines, as garrulax align --method sft (docs/alignment.md)",
    )

    align = commands.add_parser(
        "align",
        help="train a model on answers, preferences or rewards",
        description="Train a model with weights on conversations (sft), on answers that people have compared (reward, "
        "dpo, ipo, orpo, simpo), or on rewards for what it writes (ppo, rloo, grpo, dr_grpo, dapo, gspo). "
        "docs/alignment.md shows the files.",
    )
    align.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="the model, and settings as of garrulax train")
    align.add_argument("--method", metavar="NAME", help="sft, reward, dpo, ppo, ... (sft)")
    align.add_argument(
        "--data", metavar="FILE", help="conversations, compared answers or prompts, one JSON object a line"
    )
    align.add_argument("--valid", metavar="FILE", help="held-out ones; without it one record in twenty is held out")
    align.add_argument(
        "--reward", metavar="WHAT", help="MODULE:FUNCTION, which gets a sample, or the folder of a reward model"
    )
    align.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="of the method, such as beta=0.1 or group=8; may be given several times",
    )  # fmt: skip
    align.add_argument("--lora", metavar="NAME=VALUE,...", help="train a LoRA adapter alone, such as rank=16")
    align.add_argument("--ptx", type=float, metavar="WEIGHT", help="of the loss on the text corpus= (PPO-ptx)")
    align.add_argument("--run", metavar="FOLDER", help="folder for the run (default: runs/MODEL-METHOD)")
    align.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    align.add_argument("--config", metavar="FILE", help="read settings from this TOML file")
    align.add_argument("--mesh", metavar="AXES", help="use several devices, by axis: such as fsdp=4,tensor=2")

    generate = commands.add_parser(
        "generate", help="continue a text", description="Continue a text; tokens are shown as soon as they are sampled."
    )
    _add_writing(generate)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times"
    )
    _add_constraints(generate)
    _add_cache(generate)
    generate.add_argument(
        "--chat", action="store_true", help="send the text as a message to a chat model, and show its answer"
    )
    fill = commands.add_parser(
        "fill", help="fill the [MASK]s of a text (GLM)", description="Fill every [MASK], [sMASK] and [gMASK] of a text."
    )
    _add_writing(fill)
    chat = commands.add_parser(
        "chat",
        help="talk with a chat model",
        description="Talk with a chat model in the terminal; /help lists the commands there. Without a terminal each "
        "line of standard input is a message. Ctrl-C stops an answer, Ctrl-D ends the chat.",
    )
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system prompt")
    _add_cache(chat)
    chat.add_argument(
        "--stream",
        action="store_true",
        help="a conversation without an end: the first tokens and as many of the last as the context has are kept",
    )
    _add_sampling(chat, "as many tokens as fit into the model's context, up to 512")

    info = commands.add_parser(
        "info",
        help="describe a preset or a model",
        description="Show the configuration, parameters, memory and FLOPs of a model.",
    )
    info.add_argument(
        "model", help="a preset (`garrulax info --all` lists them), a model folder, a GGUF file, or a run", nargs="?"
    )
    info.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="with --train: a setting, such as batch=8 or weights=bfloat16"
    )
    info.add_argument("--all", action="store_true", help="list all presets")
    info.add_argument("--train", action="store_true", help="show the memory and time that training takes instead")
    _add_plan(commands)
    glitch = commands.add_parser(
        "glitch",
        help="list the tokens that look untrained",
        description="List the tokens whose embeddings look untrained, the most likely first.",
    )
    glitch.add_argument("model", help="a run, a Hugging Face model folder, a GGUF file, or a name on the hub")
    glitch.add_argument("--top", type=int, default=20, metavar="N", help="number of tokens to list (20)")
    glitch.add_argument("--side", choices=("input", "output"), help="use the input or the output embeddings only")
    glitch.add_argument("--plot", metavar="FILE", help="draw the scores into this file, such as glitch.png")
    score = commands.add_parser(
        "score",
        help="measure the perplexity of a text",
        description="Measure how probable a text is: log-likelihood, perplexity, bits per byte. A text that is longer "
        "than the window is read in windows that overlap.",
    )
    score.add_argument("model", help="a run, a Hugging Face model folder, a GGUF file, or a name on the hub")
    score.add_argument("file", nargs="?", help="a text file; - reads standard input")
    score.add_argument("--text", help="the text itself, in place of a file")
    score.add_argument("--window", type=int, metavar="N", help="tokens of a window (the model's context)")
    score.add_argument("--stride", type=int, metavar="N", help="tokens that each further window scores (half a window)")
    score.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    detect = commands.add_parser(
        "detect",
        help="look for a watermark in a text",
        description="Test whether a text was written with --watermark KEY. Only the tokenizer of the model is read.",
    )
    detect.add_argument("model", help="a run, a Hugging Face model folder, a GGUF file, or a name on the hub")
    detect.add_argument("file", nargs="?", help="a text file, without the prompt; - reads standard input")
    detect.add_argument("--text", help="the text itself, in place of a file")
    detect.add_argument("--key", required=True, help="the key with which it may have been written")
    detect.add_argument("--scheme", choices=("green", "gumbel"), help="kind of watermark (green)")
    detect.add_argument("--gamma", type=float, metavar="P", help="of green lists, the share of green tokens (0.25)")
    detect.add_argument("--context", type=int, metavar="N", help="tokens of a context (4)")
    detect.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    report = commands.add_parser(
        "report",
        help="write a page about one or several runs",
        description="Write one HTML page with the curves, settings, environment and samples of one or several runs.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    report.add_argument("--out", metavar="FILE", help="the page (report.html in the folder of the first run)")
    convert = commands.add_parser(
        "convert",
        help="convert a model folder or GGUF file",
        description="Write the model of a folder or GGUF file into a folder. Memory holds one tensor at a time.",
    )
    convert.add_argument(
        "source", metavar="SRC", help="a Hugging Face model folder, a GGUF file, a run, or a name on the hub"
    )
    convert.add_argument("target", metavar="DST", help="the folder to write; a model in it is replaced")
    convert.add_argument("--dtype", help="of all tensors: float32, bfloat16 or float16 (default: as stored)")
    convert.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="greatest size of a file, such as 200MB (5GB)"
    )
    convert.add_argument(
        "--step", type=int, metavar="N", help="of a run: the checkpoint of this step, in place of the final model"
    )
    convert.add_argument("--dialect", help="checkpoint format, if the family has several, such as glm")
    convert.add_argument("--quantise", metavar="KIND", help="quantise the weights: int8, int4, nf4, fp8, mxfp4, w8a8")
    convert.add_argument("--group", type=int, metavar="N", help="inputs that share a scale; -1 is a row (by KIND)")
    convert.add_argument("--gptq", action="store_true", help="quantise int8 and int4 by GPTQ, with --calibrate")
    convert.add_argument("--awq", action="store_true", help="quantise int8 and int4 by AWQ, with --calibrate")
    convert.add_argument("--smoothquant", action="store_true", help="quantise w8a8 and int8 so, with --calibrate")
    convert.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text like those that the model will read; its end measures the perplexity",
    )
    convert.add_argument(
        "--format",
        help="of quantised weights: compressed-tensors, which transformers reads, or garrulax, for all kinds",
    )
    merge = commands.add_parser(
        "merge",
        help="write a model and an adapter as one model",
        description="Add a LoRA adapter to the weights of its model, and write the sum as a model folder.",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT folder, or the run of an adapter")
    merge.add_argument("target", metavar="DST", help="the folder to write; a model in it is replaced")
    merge.add_argument("--base", metavar="MODEL", help="the model (default: the one that adapter_config.json names)")
    merge.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="greatest size of a file, such as 200MB (5GB)"
    )
    for name in ("generate", "fill", "chat", "score"):
        commands.choices[name].add_argument(
            "--adapter", metavar="FOLDER", help="a LoRA adapter of the model: a PEFT folder, or the run of an adapter"
        )
        commands.choices[name].add_argument(
            "--mesh",
            metavar="AXES",
            help="split the model over all devices, by axis: such as tensor=2 or fsdp=4,tensor=2",
        )
    for name in ("generate", "fill", "chat", "info", "glitch", "score", "detect", "convert", "merge"):
        commands.choices[name].add_argument(
            "--ignore",
            type=lambda text: text.split(","),
            default=(),
            metavar="KEY,...",
            help="leave out these keys of config.json, or of a GGUF file's metadata, which otherwise would be refused",
        )
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict memory and speed of training on a pod",
        description="Compile the training step for chips that are not there, and show its memory, operations, "
        "collectives and predicted time (docs/plan.md).",
    )
    plan.add_argument("model", metavar="PRESET", help="a preset (`garrulax info --all` lists them)")
    plan.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="a setting of the run, such as remat=dots or model.layers=40"
    )
    plan.add_argument("--topology", required=True, metavar="NAME", help="chips, such as v5p:4x4x4 or v5e:16x16")
    plan.add_argument("--batch", type=int, required=True, metavar="ROWS", help="rows in a step, on all chips together")
    plan.add_argument("--length", type=int, metavar="N", help="tokens in a row (the model's context)")
    plan.add_argument("--strategy", default="fsdp", metavar="NAME", help="how the model is sharded (fsdp)")
    plan.add_argument("--mesh", metavar="AXES", help="chips by axis, such as fsdp=64,tensor=8")
    plan.add_argument("--search", action="store_true", help="rank strategies, meshes and remat policies")
    plan.add_argument("--compile", type=int, default=3, metavar="N", help="with --search, how many to compile (3)")
    plan.add_argument("--xla", action="append", default=[], metavar="OPTION=VALUE", help="an option of the compiler")
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_writing(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("text", help="the text; - reads it from standard input")
    _add_sampling(command, "as many tokens as fit into the model's context, up to 128")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a run, a Hugging Face model folder, a GGUF file, or a name on the hub")


def _add_sampling(command: argparse.ArgumentParser, most: str) -> None:
    command.add_argument("--max-new-tokens", type=int, metavar="N", help=f"greatest length of each answer ({most})")
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (0.8)"
    )
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 is all (0)"
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (0.95)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (0)")
    _add_programs(command)


def _add_constraints(command: argparse.ArgumentParser) -> None:
    """Further ways to say what is written."""
    command.add_argument(
        "--min-p", type=float, metavar="P", help="leave out tokens less than P times as likely as the likeliest"
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="make tokens of the text less likely, by a factor such as 1.1",
    )
    command.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="never write the same N tokens in a row twice"
    )
    command.add_argument(
        "--beams", type=int, metavar="N", help="search with N beams; shown at the end, and not sampled"
    )
    command.add_argument(
        "--watermark", metavar="KEY", help="mark the text with this key, so that `garrulax detect` recognises it"
    )
    command.add_argument("--watermark-scheme", choices=("green", "gumbel"), help="kind of watermark (green)")
    command.add_argument(
        "--watermark-gamma", type=float, metavar="P", help="of green lists, the share of green tokens (0.25)"
    )
    command.add_argument(
        "--watermark-delta",
        type=float,
        metavar="X",
        help="of green lists, what is added to the logits of green tokens (2)",
    )
    command.add_argument(
        "--watermark-context",
        type=int,
        metavar="N",
        help="tokens on which the choice of the next one depends, 1 to 8 (4)",
    )
    command.add_argument(
        "--speculate",
        metavar="WAY",
        help="read guessed tokens together, which gives the same text sooner: lookup guesses what followed before, "
        "layers=N what the model's first N layers say, medusa=FOLDER what Medusa heads say, and a model (as MODEL) "
        "what it says",
    )
    kinds = command.add_mutually_exclusive_group()
    kinds.add_argument("--json-schema", metavar="FILE", help="write JSON that satisfies the schema in this file")
    kinds.add_argument("--regex", metavar="PATTERN", help="write a text that matches this regular expression")


def _add_cache(command: argparse.ArgumentParser) -> None:
    """Adds the options --cache, --kv and --offload, which `cli.caches` reads."""
    command.add_argument(
        "--cache",
        default="full",
        metavar="KIND",
        help="what is kept of the text: full, window=N, sinks=FIRST,N, blocks, or "
        "blocks=SIZE,TOP,FIRST,LOCAL,REPRESENTATIVES (full)",
    )
    command.add_argument("--kv", choices=("int8",), help="keep keys and values in 8 bits, which takes less memory")
    command.add_argument(
        "--offload",
        action="store_true",
        help="with --cache blocks: keep keys and values in the memory of the host, which is larger than the device's",
    )


def _add_programs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-cache",
        dest="programs",
        action="store_false",
        help="do not keep compiled programs for the next time (by default in the user's cache folder, up to 2 GB)",
    )
