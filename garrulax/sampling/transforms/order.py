"""The standard order of transforms."""

import difflib
import functools
from collections.abc import Callable, Iterable

from garrulax.sampling.transforms import filters, lengths, penalties, sequences, tokens, watermarks
from garrulax.sampling.transforms.base import Transform, chain
from garrulax.sampling.transforms.guidance import guidance

#: Knob -> its transform, in the order in which transformers applies them. It lacks logit_bias, the two penalties of
#: OpenAI's interface and allowed_tokens, which stand beside their likes: sequence_bias, repetition_penalty, and the
#: place of prefix_allowed_tokens_fn.
STANDARD: dict[str, Callable[[], Transform]] = {
    "guidance_scale": guidance,
    "sequence_bias": sequences.sequence_bias,
    "logit_bias": tokens.logit_bias,
    "repetition_penalty": penalties.repetition_penalty,
    "frequency_penalty": penalties.frequency_penalty,
    "presence_penalty": penalties.presence_penalty,
    "no_repeat_ngram_size": sequences.no_repeat_ngram,
    "bad_words_ids": sequences.bad_words,
    "min_length": lengths.min_length,
    "min_new_tokens": lengths.min_new_tokens,
    "allowed_tokens": tokens.allowed_tokens,
    "forced_bos_token_id": lengths.forced_bos,
    "forced_eos_token_id": lengths.forced_eos,
    "exponential_decay_length_penalty": lengths.exponential_decay_length_penalty,
    "suppress_tokens": tokens.suppress_tokens,
    "begin_suppress_tokens": lengths.begin_suppress_tokens,
    "temperature": filters.temperature,
    "top_h": filters.top_h,
    "top_k": filters.top_k,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
    "typical_p": filters.typical_p,
    "epsilon_cutoff": filters.epsilon_cutoff,
    "eta_cutoff": filters.eta_cutoff,
    "watermark": watermarks.watermarking,
}
ALWAYS = ("temperature", "top_k", "top_p")


def standard_chain(names: Iterable[str] = ()) -> Transform:
    """Returns the chain of the transforms that read the given knobs, in the order of `STANDARD`.

    Args:
        names: Names of knobs. Temperature, top_k and top_p are always part of the chain.

    Returns:
        The chain; for equal sets of names the same object.

    Raises:
        ValueError: A name that no transform of this package reads.

    Example:
        >>> from garrulax.sampling import transforms
        >>> transforms.standard_chain(["top_k"]) is transforms.DEFAULT
        True
    """
    return _standard_chain(frozenset(names) | frozenset(ALWAYS))


@functools.cache
def _standard_chain(names: frozenset[str]) -> Transform:
    if unknown := sorted(names - STANDARD.keys()):
        raise ValueError(f"there is no knob {unknown[0]!r}{suggestion(unknown[0])}")
    factories = dict(STANDARD)
    if "forced_bos_token_id" in names:
        factories["begin_suppress_tokens"] = functools.partial(lengths.begin_suppress_tokens, after_forced_bos=True)
    return chain(*(factory() for name, factory in factories.items() if name in names))


def suggestion(name: str, names: Iterable[str] = STANDARD) -> str:
    """A half sentence with the most similar name, for an error; "" if there is none."""
    similar = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean {similar[0]}?" if similar else ""


#: Temperature, then top-k, then top-p: the order of transformers and vLLM.
DEFAULT = standard_chain()
