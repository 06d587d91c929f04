"""Tiny random models of every family for decoding tests: wide initial weights, so that greedy texts do not repeat."""

import dataclasses

import jax
import quick
from registry import FAMILIES

from garrulax import models
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.layers.rope import Rope

CONFIGS = {name: entry.decoding for name, entry in FAMILIES.items()}
CONFIGS["dynamic"] = models.llama.Config(
    vocab=101, context=16, width=32, layers=2, heads=4, kv_heads=1, mlp_width=48, eos=None, init_std=0.4,
    rope=Rope(kind="dynamic", factor=4, original_context=16),
)  # fmt: skip

#: The same with one layer, for tests that are not about layers: each layer is compiled as straight code.
SHALLOW = {name: dataclasses.replace(config, layers=1) for name, config in CONFIGS.items()}


def params(config, seed=0):
    return quick.init(config, jax.random.key(seed))


class Model:
    """What `garrulax.hub.Model` looks like to decoding."""

    def __init__(self, config, params, tokenizer):
        self.config, self.params, self.tokenizer = config, params, tokenizer


def byte_model(family="gpt", **changes):
    """A model over bytes with a tokenizer: ids 0..255 are bytes, from 256 on control tokens."""
    tokenizer = ByteTokenizer(GLM_SPECIALS)
    config = dataclasses.replace(CONFIGS[family], vocab=264, **changes)
    return Model(config, params(config), tokenizer)


def drained(stream):
    """All that a generator yields, and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value
