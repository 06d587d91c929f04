"""Conversations whose last message the model continues: `continue_final_message` of transformers.

A mark is appended to the last message before the conversation is written, and everything from the mark on is cut off.
"""

from collections.abc import Callable
from typing import Any

from garrulax.core.text import whole_characters
from garrulax.hub.tokenizers.interface import Message

_HALF = "\ud800"  # half a character, which no message can hold: `whole_characters` has replaced it
MARK = _HALF + " "  # templates that trim messages trim the space, which `cut` notices


def marked(message: Message, key: str) -> dict[str, Any]:
    """The message with the mark behind its text `key`, or behind the last text of a list of parts.

    Raises:
        ValueError: It has no such text.
    """
    content = message.get(key)
    if isinstance(content, str):
        return {**message, key: whole_characters(content) + MARK}
    if isinstance(content, list | tuple):
        parts = list(content)
        for i, part in reversed(list(enumerate(parts))):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                parts[i] = {**part, "text": whole_characters(part["text"]) + MARK}
                return {**message, key: parts}
    raise ValueError(f"continue_final_message: the last message has no text {key!r} to continue")


def check(text: str, message: Message, key: str, escape: Callable[[str], str] = whole_characters) -> None:
    """Checks that a conversation contains its last message as it was given.

    Args:
        text: The conversation, written with the marked message.
        message: The last message, without the mark.
        key: Key of its text.
        escape: How its text was written into the conversation.

    Raises:
        ValueError: It does not.
    """
    content = message[key]
    if not isinstance(content, str):
        content = next(part["text"] for part in reversed(content) if isinstance(part, dict) and "text" in part)
    if not has_mark(text) or escape(content).strip() not in text:
        raise ValueError("continue_final_message: the chat format does not write the last message as it is")


def has_mark(text: str) -> bool:
    """Whether a marked message is in a text, wholly or trimmed."""
    return _HALF in text


def cut(text: str) -> str:
    """The text up to the last mark. As in transformers: if the mark was trimmed, the message would have been too."""
    at = text.rfind(_HALF)
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()
