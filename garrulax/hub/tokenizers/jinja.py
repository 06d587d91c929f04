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

Messages are escaped (`escaping`), so that all control tokens in the rendered text come from the template. Their
positions are noted, the original characters are put back, and the text between the control tokens is encoded as plain
text.
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

from garrulax.core.text import whole_characters
from garrulax.hub.tokenizers import endings, escaping
from garrulax.hub.tokenizers.escaping import Escaper, Original
from garrulax.hub.tokenizers.interface import ChatTokenizer, Message, Span
from garrulax.hub.tokenizers.token_config import token_variables

SECONDS = 2.0  # time limit of a template
LARGEST = 10_000_000  # limit of characters of a text, elements of a list, and the value of a whole number


def render(
    tokenizer: ChatTokenizer,
    source: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    continued: str | None = None,
) -> tuple[str, list[Span]]:
    """A conversation in a Jinja template: its text, and the places of the control tokens that the template wrote.

    Args:
        tokenizer: Its control tokens are protected.
        source: The template.
        messages: The conversation; plain data (texts, numbers, lists, dicts).
        variables: Variables of the template, as in transformers, such as `add_generation_prompt` and `tools`.
        continued: Key of the last message's text after which the result ends; None for the whole conversation.

    Raises:
        ValueError: The template fails or exceeds a limit, or the messages are not plain data; always one line.
    """
    if len(source) > LARGEST:
        raise ValueError(f"the chat template has {len(source)} characters, more than {LARGEST}")
    source = whole_characters(source)
    escaper = Escaper(tokenizer.specials, [source, messages, variables])
    escaped = escaper.escape(messages)
    if continued is not None:
        escaped[-1] = endings.marked(escaped[-1], continued)
    given = {"messages": escaped, "tools": None, "documents": None, **token_variables(tokenizer.config)}
    rendered = _render(source, given | escaper.escape(variables), escaper.original)
    if continued is not None:
        endings.check(rendered, messages[-1], continued, escaper.escape)
        rendered = endings.cut(rendered)
    rendered = whole_characters(rendered)
    # Some tokenizer files read other letters, such as full-width ones, as a control token. These are not escaped and
    # may come from a message; so a span counts only if it contains the token's own text.
    spans = [
        (start, end, token)
        for start, end, token in tokenizer.find_specials(rendered)
        if any(content in rendered[start:end] for content, i in tokenizer.specials.items() if i == token)
    ]
    return escaper.original(rendered), spans


# -- The sandbox ------------------------------------------------------------------------------------------------------


def _render(source: str, variables: dict[str, Any], original: Original) -> str:
    """The output of a template. Raises ValueError of one line for whatever goes wrong in it."""
    environment = _Sandbox(original)
    try:
        tree = _CheckInserter().visit(environment.parse(source))
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
    """jinja2's sandbox with limits of time and size; `_CheckInserter` inserts the calls that check them."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, original: Original) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation], optimized=False
        )
        self._original = original
        self.filters |= {"tojson": _to_json, "replace": self._replace}
        self.tests |= dict.fromkeys(("eq", "==", "equalto"), self.equal) | {
            "in": lambda x, whole: self.contains(whole, x)
        }
        self.tests |= dict.fromkeys(("ne", "!="), lambda a, b: not self.equal(a, b))
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

    def equal(self, a: Any, b: Any) -> bool:
        """`a == b` in a template, of original texts."""
        return escaping.equal(self._original, a, b)

    def contains(self, whole: Any, part: Any) -> bool:
        """`part in whole` in a template, of original texts."""
        return escaping.contains(self._original, whole, part)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call in a template; methods that look for a text in a text get the original texts."""
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in escaping.SEARCHES:
            given = {key: x for key, x in kwargs.items() if key not in ("_loop_vars", "_block_vars")}  # jinja2's own
            return escaping.search(__self._original, text, name, *args, **given)
        return super().call(__context, __obj, *args, **kwargs)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        counts = () if count is None else (count,)
        return escaping.search(self._original, str(text), "replace", str(old), str(new), *counts)

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


class _CheckInserter(visitor.NodeTransformer):
    """Inserts `tick` into every loop and macro, and `checked` around every expression that can create a large value.

    Comparisons become calls of `equal` and `contains`.
    """

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

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) > 1 or node.ops[0].op not in ("eq", "ne", "in", "notin"):
            return node
        operator, right = node.ops[0].op, node.ops[0].expr
        is_search = operator.endswith("in")
        answer = _call("contains", right, node.expr) if is_search else _call("equal", node.expr, right)
        return nodes.Not(answer) if operator in ("ne", "notin") else answer

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
    if ensure_ascii:  # private characters stay: `Escaper.original` must find them
        text = re.sub(r"[^\x00-\x7f\U00100000-\U0010fffd]", lambda match: json.dumps(match[0])[1:-1], text)
    return text
