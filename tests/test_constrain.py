"""Constraints: documents satisfy their schemas within any budget, masks are exact, errors name what is wrong."""

import functools
import itertools
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import random_schemas
from random_schemas import TOKENIZERS, bound, text_of, toy_logits, write

from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.sampling import constrain

PLENTY = 100_000


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["cat", "dog"]},
        "child": {"$ref": "#"},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def mask(matcher, grammar):
    bits = np.full(-(-grammar.vocabulary.size // 32), 0xFFFFFFFF, np.uint32)
    matcher.mask(bits)
    assert not bits[-1] >> (grammar.vocabulary.size % 32 or 31) >> 1 or grammar.vocabulary.size % 32 == 0
    return set(grammar.vocabulary.ids(bits).tolist())


def check_documents(count, seed):
    """Documents of random schemas under ample and scanty budgets satisfy their schemas."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        schema = random_schemas.whole(rng)
        try:
            grammar = bound(constrain.json_schema(schema), ("bytes", "bpe", "ranks")[number % 3])
        except ValueError as error:
            if "nothing satisfies" not in str(error):  # such as multiples of 3 from 1 to 2
                raise AssertionError(schema) from error
            continue
        budget = grammar.shortest + (0, 1, 2, 5, 20, 1000)[number % 6]
        tokens, _ = write(grammar, budget, lambda _, size: rng.normal(size=size), bool(number % 2))
        assert len(tokens) <= budget
        checker = jsonschema.FormatChecker(["ipv4", "uuid"])
        jsonschema.validate(json.loads(text_of(grammar, tokens)), schema, format_checker=checker)


def test_documents_satisfy_random_schemas_within_any_budget():
    check_documents(36, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_thousand_documents(seed):
    check_documents(100, seed)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("more", [0, 1, 3, 10, 60])
def test_endless_documents_are_closed(name, more):
    grammar = bound(constrain.json_schema(PERSON), name)
    budget = grammar.shortest + more
    tokens, _ = write(grammar, budget, toy_logits, more % 2 == 0)
    assert len(tokens) <= budget
    assert tokens[-1] == TOKENIZERS[name].eos
    jsonschema.validate(json.loads(TOKENIZERS[name].decode(tokens, start=False)), PERSON)
    with pytest.raises(ValueError, match=rf"needs {grammar.shortest} tokens .* max_new_tokens={grammar.shortest - 1}"):
        grammar.matcher(grammar.shortest - 1)


def test_a_refused_token_is_as_if_the_mask_had_lacked_it():
    grammar = bound(constrain.grammar("start: WORD+\nWORD: /[a-z]{1,6} | [A-Z]{12} /"), "ranks")
    refusals = 0
    for seed in range(60):
        matcher = grammar.matcher(grammar.shortest + seed % 6)
        for step in range(200):
            logits = np.random.default_rng([seed, step]).normal(size=grammar.vocabulary.size)
            best = sorted(mask(matcher, grammar), key=lambda token: -logits[token])
            fitting = next(i for i, token in enumerate(best) if matcher.copy().accept(token))
            for token in best[:4]:
                assert token in mask(matcher, grammar)
                if matcher.accept(token):
                    assert token == best[fitting]
                    break
                refusals += 1
            else:  # refused four times: the ending goes on
                assert matcher.accept(*mask(matcher, grammar))
            if matcher.finished:
                break
    assert refusals > 10


FINITE = {
    "type": "object",
    "properties": {"a": {"enum": ["red", "reddish", 'x"y', 12, None]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
DOCUMENTS = [json.dumps({"a": a}) for a in FINITE["properties"]["a"]["enum"]]
DOCUMENTS += [json.dumps({"a": a, "b": b}) for a in FINITE["properties"]["a"]["enum"] for b in (True, False)]
WORDS = ["".join(word) for n in range(4) for word in itertools.product(("ab", "c", "é"), repeat=n)]


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        (constrain.json_schema(FINITE), DOCUMENTS),
        (constrain.regex("(ab|c|é){,3}"), WORDS),
        (constrain.grammar('start: (WORD (WORD WORD?)?)?\nWORD: "ab" | "c" | "é"'), WORDS),
    ],
    ids=["json_schema", "regex", "grammar"],
)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_greedy_tokens_are_the_best_of_the_allowed_ones(constraint, texts, name):
    grammar = bound(constraint, name)
    table, end = grammar.vocabulary.texts, TOKENIZERS[name].eos
    texts = [text.encode() for text in texts]
    for seed in range(8):
        matcher, so_far = grammar.matcher(PLENTY), b""
        for step in range(100):
            allowed = {t for t, text in enumerate(table) if text and any(x.startswith(so_far + text) for x in texts)}
            allowed |= {end} if so_far in texts else set()
            assert mask(matcher, grammar) == allowed
            logits = np.random.default_rng([seed, step]).normal(size=grammar.vocabulary.size)
            token = max(allowed, key=lambda t: logits[t])
            assert matcher.accept(token)
            if matcher.finished:
                break
            so_far += table[token]
        assert matcher.finished
        assert so_far in texts


def tokens_needed(texts, table):
    """Function from the beginning of a text to the smallest number of tokens to an end, the end token included."""

    @functools.cache
    def count(rest):
        starts = [len(text) for text in spelled if rest.startswith(text)]
        return 1 if not rest else 1 + min(count(rest[size:]) for size in starts)

    spelled = {text for text in table if text and any(text in x for x in texts)}
    return lambda so_far: min((count(x[len(so_far) :]) for x in texts if x.startswith(so_far)), default=10**6)


@pytest.mark.parametrize("budget", [1, 2, 4, 7])
def test_budget_of_a_regular_expression_is_exact(budget):
    grammar = bound(constrain.regex("(ab|c|é){,3}"))
    table, texts = grammar.vocabulary.texts, [word.encode() for word in WORDS]
    rng, needed = np.random.default_rng(budget), tokens_needed(texts, table)
    for _ in range(5):
        matcher, so_far = grammar.matcher(budget), b""
        while not matcher.finished:
            allowed = {t for t, text in enumerate(table) if text and needed(so_far + text) < matcher.left}
            allowed |= {TOKENIZERS["bpe"].eos} if so_far in texts else set()
            assert mask(matcher, grammar) == allowed
            token = int(rng.choice(sorted(allowed)))
            assert matcher.accept(token)
            so_far += table[token]


PATTERNS = [
    r"[0-9]*x", r"a{60}|bcd", r"(\d{4})-(\d\d)", r"([a-z]+ )*stop", r"(ab|cd)*", r'[^"]*"z', r"\d{3,}\.\d+e?", "é+ü",
    r"((a|b)*c){2}", r"[a-z]{2}@[a-z]+\.(com|org)", "[à-ö]*", ".{2}", r"\S+\s\W?", "a{,2}b{2}", "^x|y$", "(?:a|)b*?",
    "[]a-]+", "[^]]", "a{b}", "x{2,}?", r"[\d.-]+", r"\u00e9|\x41\t", "", "(?P<n>a)b", "[😀-😎]x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions_are_those_of_python(pattern):
    rng = np.random.default_rng(0)
    grammar = bound(constrain.regex(pattern), "bytes")
    letters = 'ab cdxyzé0.-@1\nüà😀😎]A\t"stopcomrgb{}e'
    for _ in range(100):
        text = "".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(7)))
        matcher = grammar.matcher(PLENTY)
        try:
            matches = all(map(matcher.accept, [*text.encode(), TOKENIZERS["bytes"].eos]))
        except ValueError:
            matches = False
        assert matches == bool(re.fullmatch(pattern, text, re.ASCII)), text
    grammar = bound(constrain.regex(pattern), "ranks")
    for budget in (grammar.shortest, grammar.shortest + 2, grammar.shortest + 40):
        text = text_of(grammar, write(grammar, budget, toy_logits)[0])
        assert re.fullmatch(pattern, text, re.ASCII)


def test_regular_expressions_beyond_the_automaton():
    grammar = bound(constrain.regex(r"\p{Lu}[\p{Ll}&&[^é]]{2,2000}"), "ranks")
    text = text_of(grammar, write(grammar, 30, toy_logits)[0])
    assert text[0].isupper()
    assert text[1:].islower()
    assert "é" not in text


SUITE = json.loads((Path(__file__).parent / "json_suite.json").read_text())


@pytest.mark.parametrize("group", SUITE, ids=lambda group: group["description"])
def test_a_sample_of_the_json_schema_test_suite(group):
    """No invalid document is allowed; `refused` marks the schemas that must be refused by name."""
    if "refused" in group:
        with pytest.raises(ValueError, match=re.escape(group["refused"])):
            constrain.json_schema(group["schema"])
        return
    grammar = bound(constrain.json_schema(group["schema"]), "bytes")
    for test in group["tests"]:
        matcher = grammar.matcher(PLENTY)
        try:
            allows = all(
                map(matcher.accept, [*json.dumps(test["data"], ensure_ascii=False).encode(), TOKENIZERS["bytes"].eos])
            )
        except ValueError:
            allows = False
        assert allows == test["valid"], test["description"]


def test_misspelt_keywords_are_errors_and_annotations_are_not():
    """Names in `properties`, and data, are no keywords."""
    misspelt = {"maxLenght": "maxLength", "Pattern": "pattern", "min_length": "minLength", "tpye": "type"}
    for key, meant in misspelt.items():
        schema = {"properties": {"a/b": {"type": "string", key: 3}}}
        message = f'"{key}" at #/properties/a~1b is not known: write "{meant}", or "x-{key}" if it is an annotation'
        with pytest.raises(ValueError, match=re.escape(message)):
            constrain.json_schema(schema)
    data = {"maxLenght": 3}
    annotated = {"type": "object", "properties": {"maxLenght": {"const": data, "default": data, "examples": [data]}}}
    own = "note example length count enumNames nullable propertyOrdering discriminator constraints x-maxLenght"
    standard = "title description deprecated readOnly writeOnly $comment $vocabulary definitions $defs"
    annotations = {name: {} for name in f"{own} {standard}".split()}
    assert constrain.json_schema(annotated | annotations).kind == "json_schema"


def test_bounds_of_numbers():
    """The bounds themselves, and numbers beside them; the suite has few of these, and llguidance has had a fault."""
    rng, allowed, refused = np.random.default_rng(0), 0, 0
    for _ in range(40):
        low, size = round(rng.uniform(-9, 9), int(rng.integers(2))), rng.choice([0.1, 0.25, 1, 2.5])
        names = ("minimum", "exclusiveMinimum")[rng.integers(2)], ("maximum", "exclusiveMaximum")[rng.integers(2)]
        low = int(low) if low == int(low) else low
        schema = {"type": ("number", "integer")[rng.integers(2)], names[0]: low, names[1]: low + float(size)}
        try:
            grammar = bound(constrain.json_schema(schema), "bytes")
        except ValueError as error:
            if not re.search("nothing satisfies|another bound less than 1 away", str(error)):
                raise
            continue
        for value in (low, low + float(size), low + float(size) / 2, low - 0.5, low + 0.05, low + float(size) + 0.125):
            for text in {repr(value), repr(int(value)) if value == int(value) else repr(value)}:
                matcher = grammar.matcher(PLENTY)
                try:
                    allows = all(map(matcher.accept, [*text.encode(), TOKENIZERS["bytes"].eos]))
                except ValueError:
                    allows = False
                if allows:
                    jsonschema.validate(json.loads(text), schema)
                allowed, refused = allowed + allows, refused + (not allows)
    assert min(allowed, refused) > 20, "the numbers beside the bounds decide nothing"


def test_forced_tokens_are_the_tokens_of_the_text():
    tokenizer = TOKENIZERS["ranks"]
    grammar = bound(constrain.json_schema({"enum": [{"returned": True}]}), "ranks")
    matcher = grammar.matcher(PLENTY)
    written = []
    while not matcher.finished:
        forced = matcher.forced()
        written += forced
        assert forced
        assert all(map(matcher.accept, forced))
    assert written == [*tokenizer.encode('{"returned": true}'), tokenizer.eos]
    grammar = bound(constrain.regex("function (one|two)"), "ranks")
    forced = grammar.matcher(PLENTY).forced()
    assert forced == tokenizer.encode("function (one")[: len(forced)]
    assert forced


@pytest.mark.parametrize("constraint", [constrain.json_schema(PERSON), constrain.regex("(a|bc)*d{3}e*")])
def test_rollback_and_copies(constraint):
    grammar = bound(constraint, "ranks")
    tokens, _ = write(grammar, grammar.shortest + 12, toy_logits, use_forced=False)
    matcher = grammar.matcher(grammar.shortest + 12)
    masks, copies = [], []
    for token in tokens:
        masks.append(mask(matcher, grammar))
        copies.append(matcher.copy())
        assert matcher.accept(token)
    assert matcher.finished
    for copied, expected in zip(copies, masks, strict=True):
        assert mask(copied, grammar) == expected
    at = len(tokens)
    for count in (1, 2, 0, at - 5):
        matcher.rollback(count)
        at -= count
        assert matcher.left == grammar.shortest + 12 - at
        assert mask(matcher, grammar) == masks[at]
    assert all(map(matcher.accept, tokens[at:]))
    with pytest.raises(ValueError, match="tokens were accepted"):
        matcher.rollback(len(tokens) + 1)
    with pytest.raises(ValueError, match="the text is finished"):
        matcher.accept(tokens[0])


def test_control_tokens_match_only_by_name():
    tokenizer = ByteTokenizer(["<|endoftext|>", "<|call|>"])
    for constraint in (constrain.regex("[^a]*"), constrain.grammar("start: ANY\nANY: ~/(?s:.*)aa(?s:.*)/")):
        grammar = constraint.bind(tokenizer, 300, (256,))
        allowed = mask(grammar.matcher(PLENTY), grammar)
        assert 256 in allowed
        assert max(allowed) == 256
    grammar = constrain.grammar('start: "a" <|call|> "b"').bind(tokenizer, 300, (256,))
    assert write(grammar, 9, toy_logits)[0] == [ord("a"), 257, ord("b"), 256]


def test_constraints_are_values():
    assert constrain.json_schema(PERSON) == constrain.json_schema(json.dumps(PERSON))
    assert len({constrain.regex("a"), constrain.regex("a"), constrain.regex("b")}) == 2
    assert bound(constrain.regex("a")) is bound(constrain.regex("a"))


NARROW = {"items": {"$ref": "#/$defs/a", "exclusiveMaximum": -2}, "$defs": {"a": {"minimum": -2.5}}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constrain.regex("a("), r"regex: missing \)"),
        (lambda: constrain.regex("(?=a)b"), "regex: look-around"),
        (lambda: constrain.regex(r"[^\s\S]"), "regex: nothing matches"),
        (lambda: constrain.grammar("start: word"), 'grammar: .*unknown name: "word"'),
        (lambda: constrain.json_schema("{"), "json_schema: the text is not JSON"),
        (lambda: constrain.json_schema(3), "json_schema: a schema is a dict"),
        (lambda: constrain.json_schema({"properties": {"a/b": {"not": {}}}}), '"not" at #/properties/a~1b is not supp'),
        (lambda: constrain.json_schema({"items": {"format": "iri"}}), 'the format "iri" at #/items is not supported'),
        (lambda: constrain.json_schema({"minProperties": 2}), '"minProperties" at # is not supported above'),
        (
            lambda: constrain.json_schema({"exclusiveMinimum": 0, "maximum": 0.5}),
            '"exclusiveMinimum" at # is not suppo',
        ),
        (lambda: constrain.json_schema(NARROW), '"exclusiveMaximum" at #/items is not supported with another bound'),
        (lambda: constrain.json_schema({"$ref": "http://a/b"}), "only references within it"),
        (lambda: constrain.json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "nothing satisfies this sche"),
        (lambda: bound(constrain.json_schema({"$ref": "#"})), "json_schema: no text was found that satisfies it"),
        (lambda: constrain.regex("a").bind(ByteTokenizer(), 300, ()), "give end_tokens="),
        (lambda: constrain.regex("a").bind(ByteTokenizer(), 300, (300,)), "end token 300 is no id"),
        (lambda: bound(constrain.regex("a")).matcher(9).accept(5), r"regex: token 5 \(.*\) is not allowed here"),
        (lambda: constrain.tool_call([], "glm4"), "at least one tool"),
        (lambda: constrain.tool_call([{"name": "f"}], "xml"), "no format 'xml' of tool calls"),
        (lambda: constrain.tool_call([{"name": "f", "parameters": {"not": {}}}], "glm4"), "tool 'f': the keyword"),
        (lambda: constrain.parse_tool_calls("f\n{1", "glm4"), "the call of f is not JSON"),
    ],
)
def test_errors_are_one_line_and_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_tokens_that_are_too_long_are_named():
    class Long(ByteTokenizer):
        def token_bytes(self, token):
            return b" " * 1025 if token == 70 else super().token_bytes(token)

    with pytest.raises(ValueError, match=r"regex: token 70 \(.*\) has 1025 bytes"):
        constrain.regex("a").bind(Long(), 300, (256,))


def test_llguidance_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'garrulax\[constrain\]'"):
        constrain.json_schema(PERSON)
    assert bound(constrain.regex("ab?")).shortest == 2  # the automaton needs nothing
