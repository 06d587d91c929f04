"""Conversations for instruction tuning: the usual shapes of JSON lines, and the tokens of a conversation with a mask.

The mask has the tokens of the assistant's answers and the token that ends each, and nothing else. It is found by
writing the conversation up to each answer with the model's own chat format, so that a training row has the ids of a
prompt as `apply_chat_template` gives them at inference. A format from which the answers cannot be told is refused.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]
#: Names of ShareGPT and of others for the roles.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "bot": "assistant", "model": "assistant", "tool": "tool", "observation": "observation"}  # fmt: skip


class ChatTokenizer(Protocol):
    """The part of a tokenizer that instruction tuning uses."""

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool | None = None) -> Any:
        """The ids of a conversation."""

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a plain text."""


@dataclasses.dataclass(frozen=True)
class Example:
    """The tokens of a conversation.

    Attributes:
        tokens: Ids.
        mask: Whether each token is one that the assistant writes.

    Raises:
        ValueError: If the mask has no token, or another length.
    """

    tokens: list[int]
    mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.mask) != len(self.tokens):
            raise ValueError(f"a mask of {len(self.mask)} for {len(self.tokens)} tokens: give one number a token")
        if not any(self.mask):
            raise ValueError(f"none of the {len(self.tokens)} tokens is in the mask: there is nothing to learn")

    def __len__(self) -> int:
        return len(self.tokens)


def read_records(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with the place that errors name.

    Raises:
        ValueError: If a line is not a JSON object, or the file has none.
        FileNotFoundError: If there is no such file.
    """
    found = False
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, found = f"{path}:{number}", True
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}): give one object a line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is {type(record).__name__}, not an object")
            yield where, record
    if not found:
        raise ValueError(f"{path} is empty: give one JSON object a line")


def conversation(record: Mapping[str, Any], where: str = "the record") -> list[dict[str, Any]]:
    """The messages of a record in one of the usual shapes.

    - {"messages": [{"role": ..., "content": ...}, ...]}
    - {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    - {"instruction": ..., "input": ..., "output": ...} (Alpaca; input may be missing)
    - {"conversations": [{"from": "human", "value": ...}, ...]} (ShareGPT; also "system": ...)

    Args:
        record: The object.
        where: For errors.

    Raises:
        ValueError: If it has another shape, an unknown role, or no answer of the assistant.
    """
    messages = _messages(record, where)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: message {i} has no role")
        if message["role"] not in ROLES.values():
            raise ValueError(f"{where}: message {i} has role {message['role']!r}, which is none of "
                             f"{', '.join(dict.fromkeys(ROLES.values()))}")  # fmt: skip
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no message of the assistant: there is nothing to learn")
    return [dict(message) for message in messages]


def _messages(record: Mapping[str, Any], where: str) -> list[Any]:
    if isinstance(record.get("messages"), list):
        return record["messages"]
    if isinstance(record.get("conversations"), list):
        turns = [_renamed(turn, where) for turn in record["conversations"]]
        system = record.get("system")
        return [{"role": "system", "content": system}, *turns] if system else turns
    if "instruction" in record and "output" in record:
        given = record.get("input")
        question = f"{record['instruction']}\n\n{given}" if given else record["instruction"]
        return [*as_messages(question, "user"), *as_messages(record["output"], "assistant")]
    if "prompt" in record and "completion" in record:
        return [*as_messages(record["prompt"], "user"), *as_messages(record["completion"], "assistant")]
    raise ValueError(
        f"{where} has the keys {', '.join(record)}: a conversation has messages, conversations, prompt and completion, "
        "or instruction and output"
    )


def as_messages(value: Any, role: str) -> list[Any]:
    """A text as one message of a role; a list of messages as it is."""
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _renamed(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    if turn["from"] not in ROLES:
        raise ValueError(f"{where}: {turn['from']!r} is none of {', '.join(ROLES)}")
    return {"role": ROLES[turn["from"]], "content": turn.get("value")}


def has_chat_format(tokenizer: Any) -> bool:
    """Whether a tokenizer can write conversations."""
    return bool(getattr(tokenizer, "chat_format", None) or getattr(tokenizer, "config", {}).get("chat_template"))


def plain(
    tokenizer: Any,
    messages: Sequence[Message],
    ends: Sequence[int],
    where: str,
    prompt_ids: Callable[[str], list[int]] | None = None,
) -> Example:
    """A prompt and its completion as a text, for a model without a chat format.

    Args:
        tokenizer: Of the model.
        messages: One of the user, one of the assistant.
        ends: Ids that end a text.
        where: For errors.
        prompt_ids: The ids of a prompt; None is `tokenizer.prompt`.

    Raises:
        ValueError: If there are other messages than one of the user and one of the assistant.
    """
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"{where} has messages of {', '.join(map(str, roles))}, and this model has no chat format: it can learn a "
            "prompt and a completion"
        )
    prompt, text = (str(message["content"]) for message in messages)
    first, answer = list((prompt_ids or tokenizer.prompt)(prompt)), tokenizer.encode(text, start=False)
    if not answer:
        raise ValueError(f"{where}: the completion is empty")
    return _ended(first + answer, [False] * len(first) + [True] * len(answer), ends)


def encode(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    ends: Sequence[int],
    where: str = "the conversation",
    *,
    last_only: bool = False,
) -> Example:
    """The tokens of a conversation, and which of them the assistant writes.

    All answers count where the format writes a conversation by adding to it, and ends each answer with a token. In
    other formats (ChatGLM-6B and ChatGLM2 write a conversation as one text) only the last answer does.

    Args:
        tokenizer: With a chat format.
        messages: The conversation.
        ends: Ids that end an answer, from `sampling.ends.ends_of`; the first is added behind the last answer where the
            format writes none.
        where: For errors.
        last_only: Whether only the last answer counts.

    Raises:
        ValueError: If there is no answer, or the format does not let answers be told from the rest.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where} has no message of the assistant: there is nothing to learn")
    messages = messages[: last + 1]
    whole = _ids(tokenizer, messages, begin_answer=False)
    answers = [_answer(tokenizer, messages, i, whole) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if any(span is None for span in answers):
        return _last_answer(tokenizer, messages, ends)
    tokens, mask = list(whole), [False] * len(whole)
    spans = [span for span in answers if span is not None]
    for number, (begin, stop) in enumerate(spans):
        end = _end_of(tokens, begin, stop, ends)
        if end is None and number < len(spans) - 1:  # nothing in the format tells that this answer is over
            return _last_answer(tokenizer, messages, ends)
        stop = stop if end is None else end
        if number == len(spans) - 1 or not last_only:
            mask[begin:stop] = [True] * (stop - begin)
    final = max(i for i, counted in enumerate(mask) if counted) if any(mask) else -1
    if final < 0:
        raise ValueError(f"{where}: the answers are empty")
    tokens, mask = tokens[: final + 1], mask[: final + 1]  # what a template writes behind the end is not read
    return _ended(tokens, mask, ends)


def _ids(tokenizer: ChatTokenizer, messages: Sequence[Message], *, begin_answer: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=begin_answer))


def _answer(
    tokenizer: ChatTokenizer, messages: Sequence[Message], index: int, whole: list[int]
) -> tuple[int, int] | None:
    """Finds message `index` in the ids of the conversation: its first index, and the index behind its last.

    None if the ids of the conversation up to there are not the beginning of the whole.
    """
    if index == 0:
        return None
    before = _ids(tokenizer, messages[:index], begin_answer=True)
    after = _ids(tokenizer, messages[: index + 1], begin_answer=False)
    if whole[: len(before)] != before or whole[: len(after)] != after or len(after) <= len(before):
        return None
    return len(before), len(after)


def _end_of(tokens: list[int], begin: int, stop: int, ends: Sequence[int]) -> int | None:
    """Index behind the token that ends an answer: in it, or the next one; None if there is none."""
    for i in range(begin, min(stop + 1, len(tokens))):
        if tokens[i] in ends:
            return i + 1
    return None


def _last_answer(tokenizer: ChatTokenizer, messages: Sequence[Message], ends: Sequence[int]) -> Example:
    content = messages[-1].get("content")
    if not isinstance(content, str) or not content:
        raise ValueError("the last answer has no text")
    prompt = _ids(tokenizer, messages[:-1], begin_answer=True)
    answer = tokenizer.encode(content, start=False)
    return _ended(prompt + answer, [False] * len(prompt) + [True] * len(answer), ends)


def _ended(tokens: list[int], mask: list[bool], ends: Sequence[int]) -> Example:
    """With a token behind the answer that ends it."""
    if ends and tokens[-1] not in ends:
        return Example([*tokens, ends[0]], [*mask, True])
    return Example(tokens, mask)
