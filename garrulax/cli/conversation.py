"""A conversation with a chat model: its turns and seeds, and what it forgets when it becomes too long."""

import argparse
from collections.abc import Callable, Generator

import garrulax as gx
from garrulax.cli.caches import cache_of
from garrulax.layers.cache_kinds import Kind
from garrulax.sampling import Session
from garrulax.sampling.buckets import bucket

MOST_NEW_TOKENS = 512  # of an answer, without an explicit number
FIRST = (8, 40)  # usual numbers of tokens of a first question, without what stands before it
USUAL = (16, 32, 64)  # usual numbers of new tokens of a further turn


class Conversation:
    """A conversation: its messages, and the session that has read them.

    Attributes:
        system: The system prompt; None for none.
        seed: The seed of the first answer; each further answer has the next one.
        finish_reason: Of the last answer, see `Completion`; None if it was stopped.
    """

    def __init__(self, model: gx.Model, args: argparse.Namespace, notice: Callable[[str], None]):
        """Begins a conversation.

        Args:
            model: A model; its parameters may be abstract, for `compile_ahead`.
            args: Of the command.
            notice: Called with what the user should know.

        Raises:
            ValueError: The model has no chat format, or the arguments are wrong.
        """
        if model.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer, which a chat needs")
        if not model.tokenizer.has_chat_format:
            raise ValueError(
                f"{args.model} has no chat format, neither a template nor one that is known for its family: "
                "garrulax generate continues texts with it"
            )
        if args.max_new_tokens is not None and args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
        self._tokenizer, self._context = model.tokenizer, model.config.max_length
        self._most = args.max_new_tokens or MOST_NEW_TOKENS
        self._sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        self._notice = notice
        cache = cache_of(args, model.config)
        self._endless = isinstance(cache, Kind) and cache.room is not None
        self._session = Session(model, cache)
        self.reseed(args.seed)
        self.restart(args.system)

    def restart(self, system: str | None) -> None:
        """Forgets everything, and begins with this system prompt."""
        self.system = system
        self.finish_reason: str | None = None
        self._turns: list[tuple[str, str]] = []
        self._said: list[int] = []  # ids of an endless conversation so far
        self._answers = 0  # since the seed was set, with those that are forgotten
        self._session.forget()

    def reseed(self, seed: int) -> None:
        """Gives the next answer this seed. Raises ValueError if it is none."""
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be a whole number from 0 to 2**32 - 1, not {seed}")
        self.seed, self._answers = seed, 0

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer to a question, piece by piece.

        What has been yielded when the generator is closed or interrupted stays in the conversation.

        Raises:
            ValueError: The question does not fit into the context, or the chat format refuses the conversation.
        """
        ids, room = self._go_on(question) if self._endless else self._fit(question)
        self.finish_reason, text = None, ""
        cut_off: list[int] = []
        seed = (self.seed + self._answers) % 2**32
        pieces = self._session.stream(ids, max_new_tokens=min(self._most, room), seed=seed, every=1, **self._sampling)
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    self.finish_reason = end.value.finish_reason
                    # The model has not read the last token, which is part of an answer that does not end with it.
                    cut_off = end.value.tokens[-1:] if self.finish_reason == "length" else []
                    return
                text += piece
                yield piece
        finally:
            pieces.close()
            if text.strip():  # a question without an answer is no turn: chat formats have both
                self._answers += 1
                if self._endless:
                    self._said = [*self._session.read, *cut_off]
                else:
                    self._turns.append((question, text.strip()))

    def compile_ahead(self, question: str | None = None) -> None:
        """Begins to compile the programs of the first answer, in other threads, and those of usual turns after it.

        Args:
            question: The first question, if it is known: then only what its answer needs.
        """
        if question is not None:
            lengths = [len(self._ids([], question)) - 1]
        else:
            known = len(self._ids([], "?"))
            lengths = list(dict.fromkeys([*(bucket(known + size) for size in FIRST), *USUAL]))
        self._session.compile_ahead(lengths, **self._sampling)

    def compile_for_later(self) -> None:
        """Begins to compile what the next turns need, in this length of the conversation and after a long answer."""
        read = len(self._session.read)
        for more in (0, self._most):
            self._session.compile_ahead(USUAL, read=read + more, **self._sampling)

    def _fit(self, question: str) -> tuple[list[int], int]:
        """The ids up to the answer, and the number of tokens that are left for it. Forgets what does not fit."""
        wanted = min(self._most, max(1, self._context // 4))
        for forgotten in range(len(self._turns) + 1):
            ids = self._ids(self._turns[forgotten:], question)
            room = self._context - len(ids)
            if room >= wanted:
                break
        if room < 1:
            raise ValueError(
                f"the message is too long: with it the conversation has {len(ids):,} tokens, and the model's context "
                f"is {self._context:,}"
            )
        if forgotten:
            turns = (
                "first question and answer are" if forgotten == 1 else f"first {forgotten} questions and answers are"
            )
            self._notice(f"the conversation no longer fits into the model's context: its {turns} forgotten")
            del self._turns[:forgotten]
        return ids, room

    def _go_on(self, question: str) -> tuple[list[int], int]:
        """The ids up to the answer in a conversation without an end, and the greatest number of tokens of the answer.

        The ids of what was said stay as they are, also where the text would give others: they have been read.
        """
        if not self._said:
            return self._ids([], question), self._most
        # What the chat format puts behind an answer is what two different answers have in common at their end.
        one, other = (self._ids([("?", answer)], question)[::-1] for answer in ("A", "B"))
        same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        return [*self._said, *one[:same][::-1]], self._most

    def _ids(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self._tokenizer.apply_chat_template([*messages, {"role": "user", "content": question}])
