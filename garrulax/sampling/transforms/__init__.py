"""Transforms of logits (temperature, top-k, top-p), which compose like Optax's, and sampling of a token.

    transform = chain(temperature(), top_k(), top_p())      # applied from left to right
    state = transform.init(knobs)                           # knobs: name -> [B], one value a row
    logits, state = transform.update(logits, state)         # [B, V]; -inf for a token that must not be sampled
    state = transform.observe(token, state)                 # [B], the tokens that were sampled

A knob is a sampling parameter of a row, such as its temperature. The choice of transforms is fixed when a program is
traced; the values of knobs are arrays, so that one executable serves all values. Letters: B rows, V vocabulary.
"""

from garrulax.sampling.transforms.base import Knobs, Transform, argmax, chain, sample
from garrulax.sampling.transforms.filters import temperature, top_k, top_p
from garrulax.sampling.transforms.order import DEFAULT, standard_chain
from garrulax.sampling.transforms.thresholds import top_mask
from garrulax.sampling.transforms.tokens import only

__all__ = [
    "DEFAULT",
    "Knobs",
    "Transform",
    "argmax",
    "chain",
    "only",
    "sample",
    "standard_chain",
    "temperature",
    "top_k",
    "top_mask",
    "top_p",
]
