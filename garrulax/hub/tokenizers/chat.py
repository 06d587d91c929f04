"""Conversations as ids: the published chat formats of the families, and the Jinja templates of folders.

A chat format is a function that yields the parts of a conversation. A part is the id of a control token, or a text.
Texts are encoded as plain text, so a message cannot forge the control tokens that separate messages. (In the formats of
ChatGLM-6B and ChatGLM2 the roles are plain text; there a message can imitate them.)
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from garrulax.hub.tokenizers import endings
from garrulax.hub.tokenizers.interface import ChatTokenizer, Message, Span

ChatPart = int | str | tuple[str, ...]  # an id, a text, or one text in pieces that are encoded separately
Turns = list[tuple[str, str]]  # (role, content) of each message
#: Parameters of transformers' method of the same name that this one lacks, and what to do instead.
UNAVAILABLE = {
    "conversation": "give the messages as the first argument",
    "chat_template": "give template=",
    "return_tensors": "the result is a list of ids, and numpy.array([ids]) is a batch",
    "return_dict": "the result is the list of ids",
    "return_assistant_tokens_mask": "encode the conversation up to each answer to find where it begins",
    "padding": "gx.generate takes prompts of different lengths",
    "truncation": "leave out messages",
    "max_length": "leave out messages",
    "tokenizer_kwargs": "there are no others",
}


class Conversation(NamedTuple):
    """A conversation to write; the attributes are the arguments of `Tokenizer.apply_chat_template`.

    Attributes:
        messages: The messages.
        begin_answer: Whether to append what begins an answer.
        template: Name or source of a template, or None.
        continued: Key of the last message's text that the model continues, or None.
        variables: Variables of a Jinja template.
    """

    messages: Sequence[Message]
    begin_answer: bool = False
    template: str | None = None
    continued: str | None = None
    variables: Mapping[str, Any] = {}


def conversation_of(
    messages: Sequence[Message],
    begin_answer: bool | None,
    template: str | None,
    continue_last: bool | str,
    variables: Mapping[str, Any],
) -> Conversation:
    """The checked arguments of `Tokenizer.apply_chat_template`. Each template checks the roles and contents itself."""
    _check_messages(messages)
    for name, advice in UNAVAILABLE.items():
        if variables.get(name) not in (None, False):
            raise ValueError(f"apply_chat_template has no {name}: {advice}")
    if variables.get("sanitize_control_tokens", True) is not True:
        raise ValueError("sanitize_control_tokens=False: no message may become control tokens")
    if begin_answer and continue_last:
        raise ValueError("give add_generation_prompt for a new answer, or continue_final_message: not both")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"template must be a name or the source of a template, not {template!r:.40}")
    variables = {name: x for name, x in variables.items() if name not in {*UNAVAILABLE, "sanitize_control_tokens"}}
    begin_answer = not continue_last if begin_answer is None else bool(begin_answer)
    key = continue_last if isinstance(continue_last, str) else "content" if continue_last else None
    return Conversation(messages, begin_answer, template, key, variables)


def conversation_ids(tokenizer: ChatTokenizer, conversation: Conversation) -> list[int]:
    """The ids of a conversation. Raises as `Tokenizer.apply_chat_template` does."""
    written = _write(tokenizer, conversation)
    if isinstance(written, tuple):
        return tokenizer.encode_with_specials(*written)
    return [token for part in written for token in _encode_part(tokenizer, part)]


def conversation_text(tokenizer: ChatTokenizer, conversation: Conversation) -> str:
    """The text of a conversation, with its control tokens spelled out.

    Raises:
        ValueError: As `conversation_ids`; or a message spells a control token, which no text can tell from a real one.
    """
    text, spans = _text_and_spans(tokenizer, _write(tokenizer, conversation))
    found = tokenizer.find_specials(text)
    if found != spans:
        start, end, _ = next((span for span in found if span not in spans), (0, 0, 0))
        raise ValueError(
            f"tokenize=False: a message spells the control token {text[start:end]!r}, and no text can tell it from a "
            "real one: take the ids"
        )
    return text


def answer_ends(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The control token that stands behind an answer in the tokenizer's chat format, if there is one.

    It is found by writing a conversation. A template that refuses this conversation gives nothing.
    """
    probe = "garrulax"
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", probe), ("user", "b"))]
    try:
        text, spans = _text_and_spans(tokenizer, _write(tokenizer, Conversation(messages)))
    except (ValueError, ImportError):
        return ()
    end = text.rfind(probe) + len(probe)
    return tuple(token for start, _, token in spans if start >= end and not text[end:start].strip())[:1]


Written = list[ChatPart] | tuple[str, list[Span]]


def _write(tokenizer: ChatTokenizer, conversation: Conversation) -> Written:
    """The parts of a conversation in a published format, or its text and control tokens in a Jinja template."""
    messages, begin_answer, _, continued, variables = conversation
    name, source = _find_template(tokenizer, conversation)
    if source is not None:
        from garrulax.hub.tokenizers import jinja  # here, since jinja2 is optional

        variables = {"add_generation_prompt": begin_answer, **variables}
        return jinja.render(tokenizer, source, messages, variables, continued)
    if given := [key for key, value in variables.items() if value is not None]:
        raise ValueError(f"the {name} format has no variables ({', '.join(given)}): a Jinja template may")
    given_messages = [*messages[:-1], endings.marked(messages[-1], continued)] if continued else messages
    try:
        parts = list(FORMATS[name](tokenizer, given_messages, begin_answer))
    except KeyError as error:
        raise ValueError(f"the {name} format needs the token {error}, which this tokenizer does not have") from error
    return parts if continued is None else _cut(parts, messages[-1], continued)


def _cut(parts: list[ChatPart], message: Message, key: str) -> list[ChatPart]:
    """The parts up to the mark in the last message."""
    texts = [part if isinstance(part, str) else "".join(part) if isinstance(part, tuple) else "" for part in parts]
    endings.check("".join(texts), message, key)
    last = max(i for i, text in enumerate(texts) if endings.has_mark(text))
    part = parts[last]
    if isinstance(part, tuple):
        piece = max(i for i, text in enumerate(part) if endings.has_mark(text))
        return [*parts[:last], (*part[:piece], endings.cut(part[piece]))]
    return [*parts[:last], endings.cut(texts[last])]


def _text_and_spans(tokenizer: ChatTokenizer, written: Written) -> tuple[str, list[Span]]:
    if isinstance(written, tuple):
        return written
    names = {i: content for content, i in tokenizer.specials.items()}
    text, spans = "", []
    for part in written:
        piece = names.get(part, "") if isinstance(part, int) else part if isinstance(part, str) else "".join(part)
        if isinstance(part, int):
            spans.append((len(text), len(text) + len(piece), part))
        text += piece
    return text, spans


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of {'role': ..., 'content': ...}")
    if not messages:
        raise ValueError("there are no messages: give at least one {'role': 'user', 'content': ...}")
    for i, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or not role.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"message {i} has role {role!r}: a role is a word such as user, assistant or system")


def _find_template(tokenizer: ChatTokenizer, conversation: Conversation) -> tuple[str, str | None]:
    """Name of a published format and None, or any name and the source of a Jinja template."""
    template, own = conversation.template, tokenizer.config.get("chat_template")
    named = named_templates(own)
    if template is None and named:
        template = "tool_use" if conversation.variables.get("tools") and "tool_use" in named else "default"
        if template not in named:
            raise ValueError(
                f"the chat templates of this tokenizer are {', '.join(named)}: give template= the name of one"
            )
    elif template is None and own is not None:
        raise ValueError(f"the chat_template of this tokenizer is not a text but {own!r:.40}: give template=")
    elif template is None:
        template = tokenizer.chat_format
    if template in named:
        return "", named[template]
    if template in FORMATS:
        return template, None
    if template is None or not ("{{" in template or "{%" in template):
        problem = "this tokenizer has no chat template" if template is None else f"there is no chat format {template!r}"
        names = ", ".join(dict.fromkeys((*named, *FORMATS)))
        raise ValueError(f"{problem}: give template=, one of {names}, or the source of a Jinja template")
    return "", template


def named_templates(template: Any) -> dict[str, str]:
    """The Jinja sources by name in an entry `chat_template`, which is one template ("default") or several."""
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    entries = template.items() if isinstance(template, dict) else ()
    return {name: text for name, text in entries if text and isinstance(name, str) and isinstance(text, str)}


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
