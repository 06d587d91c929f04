"""Jinja chat templates: rendered in a sandbox, with messages that cannot forge control tokens.

A template comes with a model's files, so it is treated as foreign code: jinja2's immutable sandbox, no file access,
bounded time, and values of bounded size. (A value is measured when it is made: a hostile template can still take
gigabytes for a moment, with str.replace say.) What people wrote is data within its data: a message that spells
`<|im_end|>` must not end a message. So while the template runs, the characters with which control tokens begin and end
are replaced in all messages by private ones, one for one. Whatever the template does with a message then (strip, split,
replace, join), the control tokens in the result are the template's own. Their places are noted, the characters put
back, and the text between these places is encoded as plain text.
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

from garrulax.hub.tokenizers.base import Message, Tokenizer
from garrulax.hub.tokenizers.families import names_of

SECONDS = 2.0  # that a template may take
LARGEST = 10_000_000  # characters, elements, and the value of a whole number


def encode(tokenizer: Tokenizer, source: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
    """The ids of a conversation in a Jinja template, whose variables are as in transformers.

    Raises ValueError, in one line, for whatever goes wrong in the template, and for messages that are not plain data.
    """
    if len(source) > LARGEST:
        raise ValueError(f"the chat template has {len(source)} characters, more than {LARGEST}")
    guard = _Guard(tokenizer.specials, source, [messages, variables])
    names = names_of(tokenizer.config)
    given = {"messages": guard.hide(messages), "tools": None, "documents": None, **names, **guard.hide(variables)}
    rendered = _run(source, given)
    # Some files read other letters, full-width ones say, as a control token: only its own are the template's.
    spans = [
        (start, end, token)
        for start, end, token in tokenizer.spelled(rendered)
        if any(content in rendered[start:end] for content, i in tokenizer.specials.items() if i == token)
    ]
    return tokenizer.encode_around(guard.show(rendered), spans)


class _Guard:
    """Replaces the first and last characters of control tokens by private ones, and back."""

    def __init__(self, specials: Iterable[str], source: str, data: Any):
        self._specials = specials = list(filter(None, specials))
        ends = sorted({end for content in specials for end in (content[0], content[-1])})
        used = set(json.dumps(data, ensure_ascii=False, default=str)) | set(source)
        private = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in used)
        self._hidden = dict(zip(map(ord, ends), private, strict=False))
        self._shown = {ord(private): chr(end) for end, private in self._hidden.items()}
        # What a template looks for in messages, such as </think>, stays as it is if it has no part in a control token.
        literals = {literal for literal in _literals(source) if not any(_meet(literal, c) for c in specials)}
        literals = {literal for literal in literals if literal != literal.translate(self._hidden)}
        self._literal = re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or r"(?!)")

    def hide(self, value: Any, key: str = "") -> Any:
        """`value`, plain data, with its texts guarded. Keys and roles that are words stay: templates look for them."""
        if isinstance(value, str):
            return value if key == "role" and self._is_word(value) else self._hide(value)
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Mapping):
            named = {str(name): entry for name, entry in value.items()}
            return {
                name if self._is_word(name) else self._hide(name): self.hide(entry, name)
                for name, entry in named.items()
            }
        if isinstance(value, list | tuple):
            return [self.hide(entry) for entry in value]
        raise ValueError(f"a chat template takes texts, numbers, lists and dicts, not {type(value).__name__}")

    def _is_word(self, text: str) -> bool:
        return bool(re.fullmatch(r"[\w-]+", text)) and not any(content in text for content in self._specials)

    def _hide(self, text: str) -> str:
        pieces, at = [], 0
        for match in self._literal.finditer(text):
            pieces += [text[at : match.start()].translate(self._hidden), match[0]]
            at = match.end()
        return "".join([*pieces, text[at:].translate(self._hidden)])

    def show(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self._shown)


def _literals(source: str) -> set[str]:
    try:
        constants = _Sandbox().parse(source).find_all(nodes.Const)
        return {constant.value for constant in constants if isinstance(constant.value, str)}
    except (jinja2.TemplateError, RecursionError):
        return set()  # `_run` explains


def _meet(a: str, b: str) -> bool:
    """Whether a text can hold `a` and `b` so that they overlap."""
    if a in b or b in a:
        return True
    return any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))


# -- The sandbox ------------------------------------------------------------------------------------------------------


def _run(source: str, variables: dict[str, Any]) -> str:
    environment = _Sandbox()
    try:
        tree = _Bounds().visit(environment.parse(source))
        template = environment.template_class.from_code(environment, environment.compile(tree), environment.globals)
        return environment.concat(template.generate(**variables))
    except _Refusal as error:
        raise ValueError(f"the chat template refuses these messages: {_line(error)}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails: {_line(error)}") from error
    except Exception as error:  # templates compute: anything can come out of one
        raise ValueError(f"the chat template fails with a {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Refusal(Exception):
    pass


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with limits of time and size that `_Bounds` puts into a template."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation], optimized=False
        )
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        del self.globals["lipsum"]
        self._deadline = time.monotonic() + SECONDS

    def tick(self) -> str:
        """Nothing, or an error when the time is over; called in every turn of a loop and every macro."""
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"it takes more than {SECONDS:.0f} seconds")
        return ""

    def checked(self, value: Any) -> Any:
        """`value`, or an error if it is too large."""
        size = len(value) if isinstance(value, str | list | tuple | dict) else value if isinstance(value, int) else 0
        if abs(size) > LARGEST:
            raise jinja2.TemplateRuntimeError(f"a value grows beyond {LARGEST}")
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block writes, counted before it is joined."""
        kept, size = [], 0
        for piece in pieces:
            size = self.checked(size + len(piece))
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or power whose size is known not to be too large."""
        if operator == "**":
            self.checked(LARGEST + 1 if isinstance(right, int) and right > 64 else 0)
        else:
            sizes = [len(x) if isinstance(x, str | list | tuple) else x for x in (left, right)]
            if all(isinstance(size, int) for size in sizes):
                self.checked(sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)


class _Bounds(visitor.NodeTransformer):
    """Puts `tick` into every loop and macro, and `checked` around what makes values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick")]))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("tick")]))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        node.body = [self.visit(child) for child in node.body]  # its call must stay a call
        return node

    def visit_Expression(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("checked", node)

    visit_Add = visit_Concat = visit_Mul = visit_Pow = visit_Mod = visit_Call = visit_Expression

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return _call("checked", node) if isinstance(node.value, int) else node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return node if node.node is None else _call("checked", node)  # without a node it is a filter block's


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(ext.Extension):
    """`{% generation %}`, with which transformers marks answers in training data: what it holds is plain text here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # but for what stands in for characters of control tokens
        text = re.sub(r"[^\x00-\x7f\U00100000-\U0010fffd]", lambda match: json.dumps(match[0])[1:-1], text)
    return text
