"""`perplexity`: the log-likelihood of long texts, read in windows that overlap."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

from garrulax.core.config import ModelConfig
from garrulax.evaluate.passes import BATCH_TOKENS, prepare, score_rows
from garrulax.evaluate.rows import Row, continuation_row, longest_text
from garrulax.evaluate.texts import encode_pair, size_in_bytes, text_of
from garrulax.models.unpack import ModelLike
from garrulax.sampling.requests import Prompt, prompt_list

ROWS_AT_A_TIME = 1024  # of windows, so that a small stride does not fill the memory with windows


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The negative log-likelihood of texts, and what it is divided by.

    Attributes:
        nll: Sum over the scored tokens, in nats.
        tokens: Number of scored tokens.
        bytes: UTF-8 bytes of the texts; None for token ids of a model without a tokenizer.
        words: Parts of the texts between runs of white space, as lm-evaluation-harness counts; None likewise.

    Example:
        >>> import garrulax as gx
        >>> found = gx.Perplexity(nll=20.0, tokens=10, bytes=40, words=8)
        >>> round(found.perplexity, 3), round(found.bits_per_byte, 3), round(found.word_perplexity, 3)
        (7.389, 0.721, 12.182)
    """

    nll: float
    tokens: int
    bytes: int | None
    words: int | None

    @property
    def perplexity(self) -> float:
        """Of a token: exp(nll / tokens)."""
        return _exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """nll in bits, divided by the bytes of the texts: comparable across tokenizers."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """exp(nll / bytes)."""
        return _exp(self.nll / self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """exp(nll / words)."""
        return _exp(self.nll / self.words) if self.words else None


def perplexity(
    model: ModelLike,
    texts: Prompt | Sequence[Prompt],
    *,
    window: int | None = None,
    stride: int | None = None,
    prefix: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Perplexity:
    """The perplexity of texts of any length. Each text is scored by itself, each of its tokens once.

    A text longer than the window is read in windows that begin `stride` tokens apart, as in Hugging Face's guide to the
    perplexity of fixed-length models: a window scores the tokens that no window before it has scored, so that each but
    those of the first window has at least window - stride tokens before it. A window always has one token before those
    that it scores, also if the stride is the whole window (Hugging Face's guide does not score a token a window there).

    A model that fills blanks (GLM) answers a [gMASK] behind the tokens that are not scored, as in `gx.score`.

    Args:
        model: From `gx.load`, or (params, config).
        texts: A text, a list of token ids, or a list of these.
        window: Greatest number of tokens in a window; None is the model's context (without the control tokens that GLM
            has in it).
        stride: Number of tokens that each further window scores, from 1 (the most context, the most work) to the
            window (the least); None is half the window.
        prefix: Token ids in front of each text, which are not scored; None takes those that the tokenizer puts before
            a prompt, such as bos, and none for token ids. Without a prefix the first token of a text is not scored;
            `prefix=[model.tokenizer.eos]` scores it, as lm-evaluation-harness does for models that have no bos.
        batch_tokens: Greatest number of tokens that are computed at a time, padding included.

    Returns:
        The sums over all texts.

    Raises:
        ValueError: An empty text, a window that does not fit into the context, a stride that does not fit into the
            window, no token to score, or an error of `gx.score`.
        FloatingPointError: The logits are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> found = gx.perplexity(model, list(range(200)), window=32, stride=16)
        >>> found.tokens, 200 < found.perplexity < 400
        (199, True)
    """
    params, config, tokenizer = prepare(model)
    window, stride = _sizes(window, stride, longest_text(config) - 1)
    items, single = prompt_list(texts)
    names = ["the text"] if single else [f"text {i}" for i in range(len(items))]
    encoded = [
        encode_pair(text, None, prefix, config, tokenizer, name) for text, name in zip(items, names, strict=True)
    ]
    tokens = sum(len(ids) - (not context) for context, ids in encoded)
    if not tokens:
        raise ValueError("there is no token to score: the first token of a text has nothing before it; give a prefix")
    rows = itertools.chain.from_iterable(_windows(context, ids, window, stride, config) for context, ids in encoded)
    nll = 0.0
    while some := list(itertools.islice(rows, ROWS_AT_A_TIME)):
        nll -= math.fsum(x for found in score_rows(some, params, config, batch_tokens) for x in found.logprobs.tolist())
    contents = [text_of(text, tokenizer) for text in items]
    return Perplexity(nll, tokens, _total(map(size_in_bytes, contents)), _total(map(_words, contents)))


def _sizes(window: int | None, stride: int | None, most: int) -> tuple[int, int]:
    window = most if window is None else window
    if not 2 <= window <= most:
        raise ValueError(f"window={window} must be from 2 to {most}, which is what fits into the model's context")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be from 1 to the window of {window} tokens")
    return window, stride


def _windows(
    context: Sequence[int], ids: Sequence[int], window: int, stride: int, config: ModelConfig
) -> Iterator[Row]:
    """The rows that score `ids`, or all but the first of them where there is no context."""
    whole = [*context, *ids]
    scored = len(context) or 1  # tokens of `whole` that need no score any more, or have it
    for begin in itertools.count(0, stride):
        end = min(begin + window, len(whole))
        if scored < end:  # not so where the context alone fills a window
            yield continuation_row(whole[min(begin, scored - 1) : scored], whole[scored:end], config)
        scored = max(scored, end)
        if end == len(whole):
            return


def _words(text: str | None) -> int | None:
    return None if text is None else len(re.split(r"\s+", text))


def _total(counts: Iterator[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(x for x in known if x is not None)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
