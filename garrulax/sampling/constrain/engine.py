"""The optional package llguidance: its import, grammars in its format, and its errors as one line."""

import json
import re
from collections.abc import Mapping
from typing import Any

LLGUIDANCE = "a constraint needs llguidance: pip install 'garrulax[constrain]'"


def llguidance() -> Any:
    """The module. Raises ImportError that says what to install."""
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(LLGUIDANCE) from error
    return llguidance


def schema_grammar(schema: Any, options: Mapping[str, Any]) -> str:
    """The grammar of a JSON schema, a text that `problem` and llguidance's matcher read."""
    source = schema if isinstance(schema, dict) else {"allOf": [schema]}  # a schema may be True or False
    grammar = llguidance().LLMatcher.grammar_from_json_schema(json.dumps(source), overrides=dict(options))
    return grammar


def lark_grammar(text: str) -> str:
    """The grammar of a text in llguidance's variant of Lark's syntax."""
    return llguidance().LLMatcher.grammar_from_lark(text)


def regex_term(pattern: str) -> str:
    r"""The regular expression as a terminal of a Lark grammar; \d, \w and \s are ASCII."""
    return f"/{llguidance().regex_to_lark(pattern, 'dws')}/"


def problem(grammar: str) -> str | None:
    """The error in a grammar, in one line; None if it has none."""
    try:
        return llguidance().LLMatcher.validate_grammar(grammar) or None
    except BaseException as error:  # a panic in Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        return f"llguidance fails on it: {error}"


def one_line(message: str) -> str:
    """The message without the excerpt of the grammar that llguidance puts behind it."""
    message = re.sub(r"\n\s*\d+ \| .*", "", message, flags=re.DOTALL)  # "   1 | start: ..."
    message = re.sub(r"; following special tokens.*", "", message, flags=re.DOTALL)
    message = re.sub(r"^at 1\(8\): invalid regex .* \(in regex\): ", "", message, flags=re.DOTALL)
    named = re.search(r"^error: (.*)", message, flags=re.MULTILINE)  # regex parse error: excerpt, then the error
    return " ".join((named[1] if named else message).split())[:300]
