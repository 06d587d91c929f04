"""Random JSON schemas whose documents are bounded, small tokenizers, and texts sampled under a constraint."""

import numpy as np
from made import byte_level_bpe, pieces, trained_ranks

from garrulax.hub.tokenizers import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer
from garrulax.hub.tokenizers.ranks import tokenizer_from_ranks

KINDS = ("string", "integer", "number", "boolean", "null", "enum", "pattern", "date", "array", "object", "anyOf", "ref")


def schema(rng, depth=0):
    """A schema that `constrain.json_schema` supports; lists and objects are at most three deep."""
    kind = KINDS[rng.integers(len(KINDS) - 4 * (depth > 2))]
    low, high = sorted(map(int, rng.integers(0, 6, 2)))
    if kind == "string":
        return {"type": "string", "minLength": low, "maxLength": high + 3}
    if kind == "integer":
        low, high = sorted(map(int, rng.integers(-2000, 2000, 2)))
        return {"type": "integer", "minimum": low, "maximum": high + 10, "multipleOf": int(rng.integers(1, 4))}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": low - 3, "maximum": high + 0.5}
    if kind == "enum":
        return {"enum": [["red", 'a"b', "é", 7, 2.5, None, True, {"x": [1]}][i] for i in rng.choice(8, 3, False)]}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-z]{2,4}(-[0-9]+)?$"}
    if kind == "date":
        return {"type": "string", "format": ("date", "date-time", "uuid", "ipv4")[rng.integers(4)]}
    if kind == "array":
        return {"type": "array", "items": schema(rng, depth + 1), "minItems": low, "maxItems": high}
    if kind == "object":
        names = [f"key {i}" for i in range(high)]
        required = [name for name in names if rng.integers(2)]
        parts = {name: schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth + 1) for _ in range(2)]}
    if kind == "ref":
        return {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": low, "maxItems": high}
    return {"type": kind}


def whole(rng):
    """A schema with the definition to which its references point."""
    return {**schema(rng), "$defs": {"leaf": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}}


def from_ranks():
    tokenizer = tokenizer_from_ranks({token: i for i, token in enumerate(trained_ranks(600))})
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return JsonTokenizer(tokenizer)


TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "bpe": JsonTokenizer(byte_level_bpe(300)),
    "pieces": SentencePieceTokenizer(pieces()),
    "ranks": from_ranks(),
}


def bound(constraint, name="bpe", padding=9):
    tokenizer = TOKENIZERS[name]
    return constraint.bind(tokenizer, tokenizer.vocab + padding, (tokenizer.eos,))


def toy_logits(prefix, size):
    """Logits of a model with random weights: some function of the last tokens."""
    return np.random.default_rng([len(prefix), *(t + 1 for t in prefix[-3:])]).normal(size=size) * 3


def write(grammar, budget, logits, use_forced=True):
    """The tokens that follow the greatest allowed logits, and the number of refused ones.

    Args:
        grammar: A bound constraint.
        budget: Greatest number of tokens.
        logits: Function of the tokens so far and the size of the vocabulary.
        use_forced: Whether to take forced tokens without sampling.
    """
    matcher, size = grammar.matcher(budget), grammar.vocabulary.size
    bits, tokens, refused = np.zeros(-(-size // 32), np.uint32), [], 0
    while not matcher.finished:
        forced = matcher.forced() if use_forced else []
        assert all(map(matcher.accept, forced))
        tokens += forced
        if not forced:
            matcher.mask(bits)
            allowed = grammar.vocabulary.ids(bits)
            token = int(allowed[np.argmax(logits(tokens, size)[allowed])])
            accepted = matcher.accept(token)
            tokens += [token] * accepted
            refused += not accepted
    return tokens, refused


def text_of(grammar, tokens):
    """The text of tokens; control tokens have none."""
    return b"".join(grammar.vocabulary.texts[token] for token in tokens).decode()
