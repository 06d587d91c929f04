"""Transforms of logits, which compose like Optax's, and sampling of a token. docs/sampling.md shows their use.

    transform = chain(temperature(), top_k(), top_p())      # applied from left to right
    state = transform.init(knobs)                           # knobs: name -> [B], one value a row
    logits, state = transform.update(logits, state)         # [B, V]; -inf for a token that must not be sampled
    state = transform.observe(token, state)                 # [B], the tokens that were sampled

A knob is a sampling parameter of a row, such as its temperature. The choice of transforms is fixed when a program is
traced; the values of knobs are arrays, so that one executable serves all values. Letters: B rows, V vocabulary.

Besides the knobs, `init` may read these reserved names:

    prompt           int32 [B, P], the tokens of each row's prompt from the left, -1 where there is none
    vocab            V, a Python integer
    size             a Python integer, the greatest number of tokens, prompt and new ones, that a row may have
    ends             int32 [B, E], the tokens that end each row, -1 for none
    limit            int32 [B], the greatest number of new tokens of each row
    unconditional    bool [B], whether the row is the second of a pair for `guidance`
"""

from garrulax.sampling.transforms.base import Knobs, Transform, argmax, chain, sample
from garrulax.sampling.transforms.filters import (
    epsilon_cutoff,
    eta_cutoff,
    min_p,
    temperature,
    top_h,
    top_k,
    top_p,
    typical_p,
)
from garrulax.sampling.transforms.guidance import guidance
from garrulax.sampling.transforms.lengths import (
    begin_suppress_tokens,
    exponential_decay_length_penalty,
    forced_bos,
    forced_eos,
    min_length,
    min_new_tokens,
)
from garrulax.sampling.transforms.order import DEFAULT, STANDARD, standard_chain
from garrulax.sampling.transforms.penalties import frequency_penalty, presence_penalty, repetition_penalty
from garrulax.sampling.transforms.sequences import bad_words, no_repeat_ngram, sequence_bias
from garrulax.sampling.transforms.thresholds import top_mask
from garrulax.sampling.transforms.tokens import allowed_tokens, logit_bias, only, suppress_tokens
from garrulax.sampling.transforms.watermarks import watermarking

__all__ = [
    "DEFAULT",
    "STANDARD",
    "Knobs",
    "Transform",
    "allowed_tokens",
    "argmax",
    "bad_words",
    "begin_suppress_tokens",
    "chain",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos",
    "forced_eos",
    "frequency_penalty",
    "guidance",
    "logit_bias",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram",
    "only",
    "presence_penalty",
    "repetition_penalty",
    "sample",
    "sequence_bias",
    "standard_chain",
    "suppress_tokens",
    "temperature",
    "top_h",
    "top_k",
    "top_mask",
    "top_p",
    "typical_p",
    "watermarking",
]
