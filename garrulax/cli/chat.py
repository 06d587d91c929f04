"""`garrulax chat`: a conversation in the terminal, or of the lines of standard input."""

import argparse
import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator

import garrulax as gx
from garrulax.cli.conversation import Conversation
from garrulax.cli.models import load
from garrulax.cli.programs import keep_programs
from garrulax.cli.waiting import waiting
from garrulax.core.text import whole_characters
from garrulax.sampling import ahead

PROMPT = "\nyou> "
HELP = """\
/reset          start again
/system TEXT    start again with this system prompt; without TEXT, with none
/seed N         the seed of the next answer; each further one takes the next number
/help           this list
/exit           end the chat; so does Ctrl-D
Ctrl-C stops an answer. A message that begins with / needs a space before it."""


def chat(args: argparse.Namespace) -> None:
    """Answers messages until the input ends. Without a terminal each line of standard input is a message."""
    keep_programs(args.programs)
    terminal = sys.stdin.isatty()
    lines = _typed() if terminal else (line.rstrip("\r\n") for line in sys.stdin)
    first = [] if terminal else list(itertools.islice(lines, 1))
    known = next((line for line in first if _is_message(line)), None)

    def begin(model: gx.Model) -> None:
        conversation = Conversation(model, args, _notice)
        if terminal or known is not None:
            conversation.compile_ahead(known)

    try:
        with waiting("reading the model"):
            model = load(args.model, args.adapter, args.ignore, begin, args.mesh)
        conversation = Conversation(model, args, _notice)
        if terminal:
            print("Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.")
        for line in itertools.chain(first, lines):
            try:
                if not _obey(conversation, whole_characters(line), terminal):
                    return
            except ValueError as error:
                if not terminal:
                    raise
                _notice(str(error))
    finally:
        ahead.cancel()


def _typed() -> Iterator[str]:
    """The lines that the user types, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` editing and a history)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _is_message(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("/")


def _obey(conversation: Conversation, line: str, terminal: bool) -> bool:
    """Answers a message or carries out a command; returns whether the chat goes on.

    Raises:
        ValueError: An unknown command, or one with a wrong value; or a message that cannot be answered.
    """
    if _is_message(line):
        _answer(conversation, line.strip(), terminal)
        return True
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.restart(conversation.system)
    elif name == "/system":
        conversation.restart(rest or None)
    elif name == "/seed":
        if not rest.isdecimal():
            raise ValueError(f"/seed takes a whole number, not {rest!r}")
        conversation.reseed(int(rest))
    elif name == "/help":
        print(HELP, file=sys.stdout if terminal else sys.stderr)  # in a script, stdout has the answers only
    elif name:
        raise ValueError(f"unknown command {name}: /help lists the commands")
    return True


def _answer(conversation: Conversation, question: str, terminal: bool) -> None:
    pieces = conversation.answer(question)
    with _one_interrupt() if terminal else contextlib.nullcontext():
        try:
            with waiting("preparing the answer"):
                first = next(pieces, "")
            if terminal:  # while the answer is written and read
                threading.Thread(target=conversation.compile_for_later, daemon=True).start()
            for piece in itertools.chain([first.lstrip()], pieces):
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            pieces.close()
            if not terminal:
                raise
            print(" ... (stopped)")
    if terminal and conversation.finish_reason == "length":
        _notice("the answer is cut off here: --max-new-tokens sets its greatest length")


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first Ctrl-C in the body raises KeyboardInterrupt; further ones do nothing, since the answer ends already."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _notice(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
