"""Time of a constraint on the host, for each token: the mask, the next token, and what is forced.

    python benchmarks/constrain.py [--tokenizer FOLDER]

Texts are sampled uniformly among the allowed tokens, the hardest case for a grammar, with a budget that cuts most
of them short. Without --tokenizer, a byte-level BPE of 50,257 tokens is trained on the source of the standard library.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import numpy as np
import tokenizers

from garrulax.hub.tokenizers import JsonTokenizer, load_tokenizer
from garrulax.sampling import constrain

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "score": {"type": "number"},
    },
    "required": ["name", "age", "tags", "kind", "score"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value", "children"],
}
SUM = """
start: sum
sum: product ("+" product)*
product: factor ("*" factor)*
factor: NUMBER | "(" sum ")"
NUMBER: /[0-9]+/
"""
CASES = {
    "schema of five keys": constrain.json_schema(PERSON),
    "recursive schema": constrain.json_schema(TREE),
    "any JSON": constrain.json_schema(True),
    "sums and products": constrain.grammar(SUM),
    "date, by the automaton": constrain.regex(r"\d{4}-\d{2}-\d{2}( [a-z]+)*"),
}


def trained():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=50257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    files = Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in sorted(files) if "site-" not in str(file))
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer)


def timed(times, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    times.append(1e6 * (time.perf_counter() - start))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a tokenizer")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--budget", type=int, default=300)
    arguments = parser.parse_args()
    tokenizer = trained() if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    print(f"{tokenizer.vocab} tokens; microseconds: median, 99 %, mean")
    bits, everything = np.zeros(-(-tokenizer.vocab // 32), np.uint32), []
    for name, constraint in CASES.items():
        start = time.perf_counter()
        grammar = constraint.bind(tokenizer, tokenizer.vocab, (tokenizer.eos,))
        first = time.perf_counter() - start
        masks, accepts, forced, rng, refused, tokens = [], [], [], np.random.default_rng(0), 0, 0
        for _ in range(arguments.texts):
            matcher = grammar.matcher(arguments.budget)
            while not matcher.finished:
                ahead = timed(forced, matcher.forced)
                tokens += len(ahead)
                for token in ahead:
                    timed(accepts, matcher.accept, token)
                if not ahead:
                    timed(masks, matcher.mask, bits)
                    token = int(rng.choice(grammar.vocabulary.ids(bits)))
                    refused += not timed(accepts, matcher.accept, token)
                    tokens += 1
        everything += masks
        parts = [
            f"{label} {summary(times)}" for label, times in (("mask", masks), ("accept", accepts), ("forced", forced))
        ]
        print(f"{name}: {', '.join(parts)}; {tokens} tokens, {refused} refused; made in {first:.2f} s")
    print(f"masks of all: {summary(everything)}")


def summary(times):
    return f"{np.median(times):.0f} {np.percentile(times, 99):.0f} {np.mean(times):.0f}"


if __name__ == "__main__":
    main()
