"""Jinja chat templates: rendered in a sandbox, with messages that cannot forge control tokens.

Why a sandbox: a template is a program that comes with a model's files, written by strangers. By default a jinja2
template can reach Python's internals and, through them, run any code. Without a sandbox the first message to a
downloaded model could run such code, read files, or never end. The sandbox refuses the following, each with a
ValueError of one line:

* access to Python's internals, such as `__class__`, `__globals__` and `mro`, and methods that change lists and dicts
  (jinja2's `ImmutableSandboxedEnvironment`);
* `include`, `import` and `extends`: there is no loader, so templates cannot read files;
* more than `SECONDS` of loops and macro calls;
* texts, lists and whole numbers beyond `LARGEST`, including the text that is written.

One limit remains: except for products and powers, the size of a value is checked after it has been computed. A hostile
template can therefore take gigabytes for a moment, for example with `str.replace`.

Why messages are escaped: users write messages, and a message that spells `<|im_end|>` must not end a message. So while
the template runs, the first and last characters of control tokens are replaced, in all messages, by private characters,
one for one. Whatever the template does with a message (strip, split, replace, join), all control tokens in the rendered
text then come from the template. Their positions are noted, the private characters are replaced back, and the text
between the control tokens is encoded as plain text.
"""

import datetime
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

try:
    import jinja2
    from jinja2 import ext, nodes, sandbox, visitor
except ImportError as error:
    raise ImportError("a Jinja chat template needs jinja2: pip install 'garrulax[chat]'") from error

from garrulax.hub.tokenizers.interface import ChatTokenizer, Message
from garrulax.hub.tokenizers.token_config import token_variables

SECONDS = 2.0  # time limit of a template
LARGEST = 10_000_000  # limit of characters of a text, elements of a list, and the value of a whole number


def encode_with_template(
    tokenizer: ChatTokenizer, source: str, messages: Sequence[Message], variables: Mapping[str, Any]
) -> list[int]:
    """The ids of a conversation in a Jinja template.

    Args:
        tokenizer: Encodes the rendered text; its control tokens are protected.
        source: The template.
        messages: The conversation; plain data (texts, numbers, lists, dicts).
        variables: Variables of the template, as in transformers, such as `add_generation_prompt` and `tools`.

    Raises:
        ValueError: The template fails or exceeds a limit, or the messages are not plain data; always one line.
    """
    if len(source) > LARGEST:
        raise ValueError(f"the chat template has {len(source)} characters, more than {LARGEST}")
    escaper = _Escaper(tokenizer.specials, source, [messages, variables])
    names = token_variables(tokenizer.config)
    given = {"messages": escaper.escape(messages), "tools": None, "documents": None, **names}
    rendered = _render(source, given | escaper.escape(variables))
    # Some tokenizer files read other letters, such as full-width ones, as a control token. These are not escaped and
    # may come from a message; so a span counts only if it contains the token's own text.
    spans = [
        (start, end, token)
        for start, end, token in tokenizer.find_specials(rendered)
        if any(content in rendered[start:end] for content, i in tokenizer.specials.items() if i == token)
    ]
    return tokenizer.encode_with_specials(escaper.unescape(rendered), spans)


class _Escaper:
    """Replaces the first and last characters of control tokens by private characters, and back."""

    def __init__(self, specials: Iterable[str], source: str, data: Any):
        self._specials = specials = list(filter(None, specials))
        ends = sorted({end for content in specials for end in (content[0], content[-1])})
        used = set(json.dumps(data, ensure_ascii=False, default=str)) | set(source)
        private = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in used)
        self._to_private = dict(zip(map(ord, ends), private, strict=False))
        self._from_private = {ord(private): chr(end) for end, private in self._to_private.items()}
        # A template may search messages for a text such as </think>. Such texts are not escaped, provided that they
        # share no characters with a control token.
        literals = {literal for literal in _literals(source) if not any(_can_overlap(literal, c) for c in specials)}
        literals = {literal for literal in literals if literal != literal.translate(self._to_private)}
        self._literal = re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or r"(?!)")

    def escape(self, value: Any, key: str = "") -> Any:
        """Plain data with all its texts escaped, except keys and roles that are words: templates compare those."""
        if isinstance(value, str):
            return value if key == "role" and self._is_word(value) else self._escape_text(value)
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Mapping):
            named = {str(name): entry for name, entry in value.items()}
            return {
                name if self._is_word(name) else self._escape_text(name): self.escape(entry, name)
                for name, entry in named.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(entry) for entry in value]
        raise ValueError(f"a chat template takes texts, numbers, lists and dicts, not {type(value).__name__}")

    def _is_word(self, text: str) -> bool:
        return bool(re.fullmatch(r"[\w-]+", text)) and not any(content in text for content in self._specials)

    def _escape_text(self, text: str) -> str:
        pieces, at = [], 0
        for match in self._literal.finditer(text):
            pieces += [text[at : match.start()].translate(self._to_private), match[0]]
            at = match.end()
        return "".join([*pieces, text[at:].translate(self._to_private)])

    def unescape(self, text: str) -> str:
        """The text with its original characters; as long as `text`, so that positions stay valid."""
        return text.translate(self._from_private)


def _literals(source: str) -> set[str]:
    """The texts that a template contains as constants."""
    try:
        constants = _Sandbox().parse(source).find_all(nodes.Const)
        return {constant.value for constant in constants if isinstance(constant.value, str)}
    except (jinja2.TemplateError, RecursionError):
        return set()  # `_render` raises the error


def _can_overlap(a: str, b: str) -> bool:
    """Whether `a` and `b` can share characters of one text."""
    if a in b or b in a:
        return True
    return any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))


# -- The sandbox ------------------------------------------------------------------------------------------------------


def _render(source: str, variables: dict[str, Any]) -> str:
    """The output of a template. Raises ValueError of one line for whatever goes wrong in it."""
    environment = _Sandbox()
    try:
        tree = _LimitInserter().visit(environment.parse(source))
        template = environment.template_class.from_code(environment, environment.compile(tree), environment.globals)
        return environment.concat(template.generate(**variables))
    except _TemplateException as error:
        raise ValueError(f"the chat template refuses these messages: {_one_line(error)}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {_one_line(error)}") from error
    except Exception as error:  # a template computes, so it can raise any exception
        raise ValueError(f"the chat template fails with a {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _TemplateException(Exception):
    """Raised by a template with `raise_exception(message)`."""


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits of time and size; `_LimitInserter` inserts the calls that check them."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation], optimized=False
        )
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # writes texts of any length
        self._deadline = time.monotonic() + SECONDS

    def tick(self) -> str:
        """Raises an error when the time is over, else returns ""; called in every iteration and every macro."""
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"it takes more than {SECONDS:.0f} seconds")
        return ""

    def checked(self, value: Any) -> Any:
        """`value`; raises an error if it is too large."""
        size = len(value) if isinstance(value, str | list | tuple | dict) else value if isinstance(value, int) else 0
        if abs(size) > LARGEST:
            raise jinja2.TemplateRuntimeError(f"a value grows beyond {LARGEST}")
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block; its length is checked before it is joined."""
        parts, size = [], 0
        for piece in pieces:
            size = self.checked(size + len(piece))
            parts.append(piece)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or power, whose size is checked before it is computed."""
        if operator == "**":
            self.checked(LARGEST + 1 if isinstance(right, int) and right > 64 else 0)
        else:
            sizes = [len(x) if isinstance(x, str | list | tuple) else x for x in (left, right)]
            if all(isinstance(size, int) for size in sizes):
                self.checked(sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)


class _LimitInserter(visitor.NodeTransformer):
    """Inserts `tick` into every loop and macro, and `checked` around every expression that can create a large value."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick")]))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick")]))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        node.body = [self.visit(child) for child in node.body]  # jinja2 requires that its call stays a plain call
        return node

    def visit_Expression(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("checked", node)

    visit_Add = visit_Concat = visit_Mul = visit_Pow = visit_Mod = visit_Call = visit_Expression

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return _call("checked", node) if isinstance(node.value, int) else node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is None:  # a filter block, whose output `concat` checks
            return node
        return _call("checked", node)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(ext.Extension):
    """`{% generation %}`, which marks answers in training data for transformers; here its content is rendered as is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _TemplateException(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # private characters stay: `_Escaper.unescape` must find them
        text = re.sub(r"[^\x00-\x7f\U00100000-\U0010fffd]", lambda match: json.dumps(match[0])[1:-1], text)
    return text
