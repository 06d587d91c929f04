"""Constraints, which do not depend on a tokenizer yet: `json_schema`, `regex` and `grammar`."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, cast

from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.constrain import engine
from garrulax.sampling.constrain import schema as schemas
from garrulax.sampling.constrain.automaton import automaton, token_table
from garrulax.sampling.constrain.guided import GuidedGrammar
from garrulax.sampling.constrain.interface import Grammar
from garrulax.sampling.constrain.regular import RegularGrammar
from garrulax.sampling.constrain.vocabulary import vocabulary

ON_HOST = 32 << 20  # bytes of a table over tokens, above which llguidance follows a regular expression


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A set of texts, one of which a model shall write. Equal constraints are equal and hash alike.

    Attributes:
        kind: Name of the function that made it, for messages.
        source: The grammar, in the format of llguidance; of a regular expression, the pattern.

    Example:
        >>> import garrulax as gx
        >>> gx.regex("[0-9]+") == gx.regex("[0-9]+"), isinstance(gx.regex("yes|no"), gx.Constraint)
        (True, True)
    """

    kind: str
    source: str = dataclasses.field(repr=False)

    def bind(self, tokenizer: TokenizerLike, vocab: int, ends: Sequence[int]) -> Grammar:
        """The grammar over the tokens of a tokenizer. It is made once and kept.

        Args:
            tokenizer: The tokenizer of the model.
            vocab: Number of the model's ids; those from `tokenizer.vocab` on are never allowed.
            ends: Ids that end a text, at least one; allowed exactly where the text may end.

        Raises:
            ValueError: `ends` is empty or no id of the model, a token is too long, or the tokenizer has no tokens for
                any of the texts.
        """
        return _bound(self, cast(Any, tokenizer), vocab, tuple(ends))


def json_schema(schema: Any, *, separators: tuple[str, str] = (", ", ": ")) -> Constraint:
    """JSON documents that satisfy a schema.

    The properties of an object come in the order of `properties`. White space is fixed: documents look like
    those of `json.dumps`, since a model may write optional white space without end.

    Args:
        schema: A JSON schema (draft 2020-12 or earlier): a dict, True or False, or the text of one.
        separators: Texts between elements and after keys, as in `json.dumps`.

    Returns:
        The constraint, for `constrain=` of `generate`.

    Raises:
        ValueError: A keyword or format that is not supported (named, with its path), a schema that nothing
            satisfies, or no schema at all.
        ImportError: llguidance (extra `constrain`) is not installed.

    Example:
        >>> from garrulax.sampling import constrain
        >>> constrain.json_schema({"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3})
        Constraint(kind='json_schema')
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"json_schema: the text is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"json_schema: a schema is a dict, True or False, not {schema!r:.40}")
    try:
        schema = json.loads(json.dumps(schema))  # a copy, with tuples as lists and all keys as texts
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema: the schema is not plain JSON data: {error}") from error
    item, key = map(re.escape, separators)
    options = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    if isinstance(schema, dict):  # llguidance's own options in a schema, such as "lenient", would loosen it
        schema = {name: value for name, value in schema.items() if name != "x-guidance"}
    source = engine.schema_grammar(schema, options)
    found = engine.problem(source) or schemas.refusal(schema)
    if found:
        raise ValueError(f"json_schema: {schemas.explained(engine.one_line(found), schema)}")
    return Constraint("json_schema", source)


def regex(pattern: str) -> Constraint:
    r"""Texts that a regular expression matches from beginning to end, as Python's `re.fullmatch` does.

    \d, \w and \s are ASCII. A finite automaton follows what `constrain.syntax` lists, exactly; llguidance (extra
    `constrain`) follows more, such as \p{L} and large numbers of repetitions. There are no lookarounds and no
    backreferences.

    Args:
        pattern: The regular expression.

    Returns:
        The constraint, for `constrain=` of `generate`.

    Raises:
        ValueError: A syntax error, something that is not supported, or nothing matches.
        ImportError: The pattern needs llguidance, which is not installed.

    Example:
        >>> from garrulax.sampling import constrain
        >>> constrain.regex(r"\d{4}-\d{2}-\d{2}")
        Constraint(kind='regex')
    """
    if not isinstance(pattern, str):
        raise ValueError(f"regex: the pattern must be a text, not {pattern!r:.40}")
    try:
        automaton(pattern)
    except NotImplementedError as error:
        try:
            _check("regex", _lark_of(pattern))
        except ImportError:
            raise ImportError(f"regex: for {error}, {engine.LLGUIDANCE}") from error
    except ValueError as error:
        raise ValueError(f"regex: {error}") from error
    return Constraint("regex", pattern)


def grammar(text: str) -> Constraint:
    """Texts of a context-free grammar, in llguidance's variant of Lark's syntax.

    `start` is the rule of the whole text. Names in capitals are terminals (regular expressions, in one piece), others
    rules, which may be recursive; `%json {...}` is a JSON schema, and `<|name|>` a control token, which has no text.
    [docs/constraints.md](../../../docs/constraints.md) has examples.

    Args:
        text: The grammar.

    Returns:
        The constraint, for `constrain=` of `generate`.

    Raises:
        ValueError: A syntax error, or the options `max_tokens=` and `stop=` of a rule, which are not supported.
        ImportError: llguidance (extra `constrain`) is not installed.

    Example:
        >>> from garrulax.sampling import constrain
        >>> constrain.grammar('start: sum\\nsum: NUMBER ("+" NUMBER)*\\nNUMBER: /[0-9]{1,3}/')
        Constraint(kind='grammar')
    """
    if not isinstance(text, str):
        raise ValueError(f"grammar: the grammar must be a text, not {text!r:.40}")
    if found := re.search(r"^\s*\w+\[[^\]\n]*\b(max_tokens|stop)\s*=", text, re.MULTILINE):
        raise ValueError(
            f"grammar: {found[1]}= is not supported: bound a terminal by {{m,n}}, end it by lazy or suffix="
        )
    source = engine.lark_grammar(text)
    _check("grammar", source)
    return Constraint("grammar", source)


def _check(kind: str, source: str) -> None:
    if found := engine.problem(source):
        raise ValueError(f"{kind}: {engine.one_line(found)}")


def _lark_of(pattern: str) -> str:
    return engine.lark_grammar(f"start: {engine.regex_term(pattern)}")


@functools.lru_cache(maxsize=64)
def _bound(constraint: Constraint, tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> Grammar:
    kind, source = constraint.kind, constraint.source
    try:
        tokens = vocabulary(tokenizer, vocab, ends)
        if kind == "regex":
            try:
                return RegularGrammar(kind, token_table(source, tokens.texts, ends, ON_HOST), tokens)
            except NotImplementedError:
                source = _lark_of(source)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error
    return GuidedGrammar(kind, source, tokens)
