"""tiktoken's rank files as byte-level BPE: LLaMA-3's and GLM-4's tokenizer.model.

A line holds a token in base64 and its id, which is also its rank. Encoding merges, again and again, the two neighbours
whose concatenation is the token of the lowest rank. In terms of BPE: every way to split a token into two tokens is a
merge, ordered by rank; and a text that is itself a token is never split (openai/tiktoken _educational.py, src/lib.rs).
"""

import base64
import binascii

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from garrulax.hub.tokenizers.library import byte_alphabet

#: How LLaMA-3 and GLM-4 cut a text before merging (models/llama3/tokenizer.py of meta-llama/llama-models).
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
PATTERN += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def is_ranks(content: bytes) -> bool:
    """Whether the content of a `.model` is lines of `base64 rank`, not a SentencePiece protobuf."""
    first = content[:256].split(b"\n")[0].split()
    return len(first) == 2 and first[0].isascii() and first[1].isdigit()


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> id of a rank file. Raises ValueError that names the first damaged line or the missing bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a base64 token and its rank: {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}: the file is damaged")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} single bytes, such as {missing[0]:#04x}, have no rank: the file is damaged")
    return ranks


def tokenizer_from_ranks(ranks: dict[bytes, int], pattern: str = PATTERN) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without control tokens.

    Args:
        ranks: Token -> id, as from `read_ranks`.
        pattern: Regular expression that cuts a text into pieces before merging.
    """
    shown = {byte: character for character, byte in byte_alphabet().items()}
    names = {token: "".join(map(shown.__getitem__, token)) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
