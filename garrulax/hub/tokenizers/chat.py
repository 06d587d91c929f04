"""Conversations as ids: the published chat formats of the families, and the Jinja templates of folders.

A chat format is a function that yields the parts of a conversation. A part is the id of a control token, or a text.
Texts are encoded as plain text, so a message cannot forge the control tokens that separate messages. (In the formats of
ChatGLM-6B and ChatGLM2 the roles are plain text; there a message can imitate them.)
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from garrulax.hub.tokenizers.interface import ChatTokenizer, Message

ChatPart = int | str | tuple[str, ...]  # an id, a text, or one text in pieces that are encoded separately
Turns = list[tuple[str, str]]  # (role, content) of each message


def encode_conversation(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    begin_answer: bool,
    template: str | None,
    variables: dict[str, Any],
) -> list[int]:
    """The ids of a conversation. Arguments and errors are those of `Tokenizer.apply_chat_template`."""
    _check_messages(messages)
    source = template if template is not None else _template_of(tokenizer.config.get("chat_template"), variables)
    name = template if template in FORMATS else tokenizer.chat_format if source is None else None
    if name is None:
        return _encode_with_jinja(tokenizer, source, messages, begin_answer, variables)
    if variables:
        raise ValueError(f"the {name} format has no variables ({', '.join(variables)}): a Jinja template may")
    try:
        parts = list(FORMATS[name](tokenizer, messages, begin_answer))
    except KeyError as error:
        raise ValueError(f"the {name} format needs the token {error}, which this tokenizer does not have") from error
    return [token for part in parts for token in _encode_part(tokenizer, part)]


def _encode_with_jinja(
    tokenizer: ChatTokenizer,
    source: str | None,
    messages: Sequence[Message],
    begin_answer: bool,
    variables: dict[str, Any],
) -> list[int]:
    if source is None or not ("{{" in source or "{%" in source):
        problem = "this tokenizer has no chat template" if source is None else f"there is no chat format {source!r}"
        raise ValueError(f"{problem}: give template=, one of {', '.join(FORMATS)}, or the source of a Jinja template")
    from garrulax.hub.tokenizers import jinja  # here, since jinja2 is optional

    return jinja.encode_with_template(tokenizer, source, messages, {"add_generation_prompt": begin_answer, **variables})


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of {'role': ..., 'content': ...}")
    if not messages:
        raise ValueError("there are no messages: give at least one {'role': 'user', 'content': ...}")
    for i, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or not role.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"message {i} has role {role!r}: a role is a word such as user, assistant or system")


def _template_of(template: Any, variables: dict[str, Any]) -> str | None:
    """The Jinja source in an entry `chat_template`, which is one template or several by name."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        name = "tool_use" if variables.get("tools") and "tool_use" in template else "default"
        if name not in template:
            raise ValueError(
                f"the chat templates of this tokenizer are {', '.join(map(str, template))}: give template= one"
            )
        template = template[name]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"the chat_template of this tokenizer is not a text but {template!r:.40}: give template=")
    return template


def _encode_part(tokenizer: ChatTokenizer, part: ChatPart) -> list[int]:
    if isinstance(part, int):
        return [part]
    if isinstance(part, str):
        return tokenizer.encode(part)
    first, *rest = part
    return tokenizer.encode(first) + [i for ids in tokenizer.encode_batch(rest, start=False) for i in ids]


# -- Formats ----------------------------------------------------------------------------------------------------------


def _chatglm(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """ChatGLM-6B (`chat` in modeling_chatglm.py): the first question stands alone, later ones in numbered rounds."""
    turns = _alternating("chatglm", messages, begin_answer)
    if len(turns) == 1:
        text = turns[0][1]
    else:
        text = "".join(
            f"[Round {i // 2}]\n问：{content}\n答：" if role == "user" else f"{content}\n"
            for i, (role, content) in enumerate(turns)
        )
    yield text
    if begin_answer:
        yield from (t.specials["[gMASK]"], t.specials["<sop>"])


def _chatglm2(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """ChatGLM2 (`build_prompt` in tokenization_chatglm.py)."""
    turns = _alternating("chatglm2", messages, begin_answer)
    yield from (t.specials["[gMASK]"], t.specials["sop"])
    yield "".join(
        f"[Round {i // 2 + 1}]\n\n问：{content}\n\n答：" if role == "user" else f"{content}\n\n"
        for i, (role, content) in enumerate(turns)
    )


def _chatglm3(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """ChatGLM3 (`build_chat_input` in tokenization_chatglm.py); a system message may list `tools`."""
    yield from (t.specials["[gMASK]"], t.specials["sop"])
    yield from _role_tokens("chatglm3", t, messages, begin_answer)


def _glm4(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """GLM-4 (`build_single_message` in tokenization_chatglm.py)."""
    yield from (t.specials["[gMASK]"], t.specials["<sop>"])
    yield from _role_tokens("glm4", t, messages, begin_answer)


def _role_tokens(name: str, t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    roles = ("system", "user", "assistant", "observation")
    for message, (role, content) in zip(messages, _turns(name, messages, roles, tools=name == "chatglm3"), strict=True):
        if message.get("tools"):
            content = f"{content}\n{json.dumps(message['tools'], indent=4, ensure_ascii=False)}"
        yield t.specials[f"<|{role}|>"]
        yield f"{message.get('metadata') or ''}\n"
        yield content
    if begin_answer:
        yield t.specials["<|assistant|>"]


def _llama2(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """LLaMA-2 chat (`chat_completion` in generation.py of facebookresearch/llama).

    Its tags, such as [INST], are plain text; `_untagged` keeps messages from forging them.
    """
    system = None
    if messages[0]["role"] == "system":
        system = _turns("llama2", messages[:1], ("system",))[0][1]
        messages = messages[1:]
    turns = _alternating("llama2", messages, begin_answer)
    bos, eos = _required(t.bos, "<s>"), _required(t.eos, "</s>")
    question: tuple[str, ...] = ()
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            yield from (bos, _joined(question, " ", _untagged(content.strip()), " "), eos)
            question = ()
        elif i == 0 and system is not None:  # the reference strips <<SYS>>...message as one text
            setting = _joined("<<SYS>>\n", _untagged(system), "\n<</SYS>>\n\n")
            question = _joined("[INST] ", setting, _untagged(content.rstrip()), " [/INST]")
        else:
            question = _joined("[INST] ", _untagged(content.strip()), " [/INST]")
    if question:
        yield from (bos, question)


def _llama3(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """LLaMA-3 (models/llama3/chat_format.py of meta-llama/llama-models)."""
    yield t.specials["<|begin_of_text|>"]
    turns = _turns("llama3", messages, ("system", "user", "assistant", "ipython", "tool"))
    for role, content in [*turns, *([("assistant", None)] if begin_answer else [])]:
        yield t.specials["<|start_header_id|>"]
        yield "ipython" if role == "tool" else role
        yield t.specials["<|end_header_id|>"]
        yield "\n\n" + ("" if content is None else content.strip())
        if content is not None:
            yield t.specials["<|eot_id|>"]


def _baichuan(t: ChatTokenizer, messages: Sequence[Message], begin_answer: bool) -> Iterator[ChatPart]:
    """Baichuan-13B-Chat and Baichuan2 (`build_chat_input` in generation_utils.py); reserved ids mark the roles."""
    ids = {"user": t.config.get("user_token_id", 195), "assistant": t.config.get("assistant_token_id", 196)}
    for i, (role, content) in enumerate(_turns("baichuan", messages, ("system", "user", "assistant"))):
        if role == "system" and i:
            raise ValueError(f"message {i} is a system message: in the baichuan format only the first may be one")
        if role != "system":
            yield ids[role]
        yield content
    if begin_answer:
        yield ids["assistant"]


#: Name of a format -> function that yields the parts of a conversation.
FORMATS: dict[str, Callable[[ChatTokenizer, Sequence[Message], bool], Iterator[ChatPart]]] = {
    "chatglm": _chatglm,
    "chatglm2": _chatglm2,
    "chatglm3": _chatglm3,
    "glm4": _glm4,
    "llama2": _llama2,
    "llama3": _llama3,
    "baichuan": _baichuan,
}


# -- Helpers ----------------------------------------------------------------------------------------------------------


def _turns(name: str, messages: Sequence[Message], roles: Sequence[str], tools: bool = False) -> Turns:
    """Roles and contents. Raises ValueError for a role that the format lacks, and for content that is not text."""
    turns = []
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role not in roles:
            raise ValueError(f"message {i} has role {role!r}: the {name} format knows {', '.join(roles)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has content {content!r:.40}: in the {name} format it must be a text")
        if message.get("tool_calls") or (message.get("tools") and not tools):
            raise ValueError(f"message {i} has tools, which the {name} format does not write: use a Jinja template")
        turns.append((role, content))
    return turns


def _alternating(name: str, messages: Sequence[Message], begin_answer: bool) -> Turns:
    """The turns of a conversation in which user and assistant alternate. Raises ValueError if they do not."""
    turns = _turns(name, messages, ("user", "assistant"))
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i} of the conversation is the {role}'s: in the {name} format they alternate")
    if begin_answer and len(turns) % 2 == 0:
        raise ValueError(f"the last message must be the user's for the {name} format to begin an answer")
    return turns


def _untagged(content: str) -> tuple[str, ...]:
    """A message in pieces of which none holds a tag of LLaMA-2: every tag in the message is cut in two.

    The pieces are encoded separately, so that no tag in a message gets the ids of a real tag.
    """
    for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
        head, *tails = content.split(tag)
        if tails:
            half = len(tag) // 2
            pieces = _untagged(head)
            for tail in tails:
                pieces = (*_joined(pieces, tag[:half]), *_joined(tag[half:], _untagged(tail)))
            return pieces
    return (content,)


def _joined(*texts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Concatenates texts in pieces: the last piece of one text and the first of the next become one piece."""
    joined = [""]
    for text in texts:
        first, *rest = (text,) if isinstance(text, str) else text
        joined[-1] += first
        joined += rest
    return tuple(joined)


def _required(token: int | None, name: str) -> int:
    if token is None:
        raise KeyError(name)
    return token
