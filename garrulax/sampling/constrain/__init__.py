"""Constrained texts: JSON that satisfies a schema, regular expressions, context-free grammars, and calls of tools.

    constraint = json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    grammar = constraint.bind(tokenizer, config.vocab, ends)   # over the tokens of a model; made once
    matcher = grammar.matcher(max_new_tokens)                  # of one text
    matcher.mask(bits)                                         # uint32 [ceil(vocab / 32)]: what may come next
    matcher.accept(token), matcher.forced(), matcher.finished

A text always ends within its budget (`Matcher`). The work is done on the host by llguidance (extra `constrain`).
"""

from garrulax.sampling.constrain.description import Constraint, grammar, json_schema, regex
from garrulax.sampling.constrain.device import regex_transform, shortest_match
from garrulax.sampling.constrain.interface import Grammar, Matcher
from garrulax.sampling.constrain.tools import ToolCall, parse_tool_calls, tool_call

__all__ = [
    "Constraint",
    "Grammar",
    "Matcher",
    "ToolCall",
    "grammar",
    "json_schema",
    "parse_tool_calls",
    "regex",
    "regex_transform",
    "shortest_match",
    "tool_call",
]
