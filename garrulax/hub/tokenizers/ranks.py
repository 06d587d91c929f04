"""tiktoken's rank files as byte-level BPE: LLaMA-3's and GLM-4's tokenizer.model.

A line holds a token in base64 and its id, which is also its rank: of all neighbours whose concatenation is a token,
those of the lowest rank are merged first. So every way to split a token into two tokens is a merge, in the order of the
ranks, and a whole piece that is a token is never split (openai/tiktoken _educational.py, src/lib.rs).
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
    """Whether a `.model` holds lines of `base64 rank` and not a SentencePiece protobuf."""
    first = content[:256].split(b"\n")[0].split()
    return len(first) == 2 and first[0].isascii() and first[1].isdigit()


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> id of a rank file. ValueError naming the first line that is damaged, or the bytes that are missing."""
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


def from_ranks(ranks: dict[bytes, int], pattern: str = PATTERN) -> tokenizers.Tokenizer:
    """The tokenizer of such ranks, without control tokens."""
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
