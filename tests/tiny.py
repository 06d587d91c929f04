"""Tiny random models of every family for decoding tests: wide initial weights, so that greedy texts do not repeat."""

import dataclasses

import jax

from garrulax import models
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.layers.rope import Rope

_SIZES = {"width": 32, "layers": 2, "heads": 4, "init_std": 0.4}

CONFIGS = {
    "gpt": models.gpt.Config(vocab=97, context=96, eos=None, bos=None, tied=False, **_SIZES),
    "glm": models.glm.Config(
        vocab=264, context=96, eos=256, pad=256, cls=257, mask=258, sentence_mask=259, generation_mask=260, sop=261,
        eop=262, **_SIZES,
    ),
    "glm130b": models.glm130b.Config(
        vocab=264, context=96, width=16, layers=1, heads=2, mlp_width=24, gated=True, tied=False, mask=258,
        sentence_mask=259, generation_mask=260, sop=261, eop=262, eos=256, dialect="glm-130b",
    ),
    "llama": models.llama.Config(vocab=101, context=96, kv_heads=2, mlp_width=48, eos=None, **_SIZES),
    "chatglm": models.chatglm.Config(vocab=103, context=96, kv_heads=2, mlp_width=48, eos=None, **_SIZES),
    "falcon": models.falcon.Config(vocab=105, context=96, kv_heads=1, norms=2, alibi=True, eos=None, **_SIZES),
    "dynamic": models.llama.Config(
        vocab=101, context=16, kv_heads=1, mlp_width=48, eos=None,
        rope=Rope(kind="dynamic", factor=4, original_context=16), **_SIZES,
    ),
}  # fmt: skip


def params(config, seed=0):
    return models.init(config, jax.random.key(seed))


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
