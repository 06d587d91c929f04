"""A tiny run for the tests of garrulax.train: its text, its settings, its data."""

import io
import pathlib

import numpy as np

from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train import batches, loop, settings
from garrulax.train.tokens import Tokens

SIZES = ["model.layers=1", "model.heads=4", "model.width=32", "model.context=32", "model.vocab=264"]
GPT = [*SIZES, "model.eos=none", "model.bos=none"]
GLM = ["preset=glm-base", *SIZES, "model.eos=256", "model.pad=256", "model.cls=257", "model.mask=258",
       "model.sentence_mask=259", "model.generation_mask=260", "model.sop=261", "model.eop=262"]  # fmt: skip
_SMALL = [*SIZES, "model.mlp_width=32", "model.pad=256", "model.mask=258", "model.generation_mask=260", "model.sop=261"]
GLM_130B = ["preset=glm-130b", *_SMALL, "model.eos=256", "model.sentence_mask=259", "model.eop=262"]
CHATGLM = ["preset=chatglm-6b", *_SMALL, "model.eop=256"]
SHORT = ["batch=8", "window=32", "steps=6", "eval_every=3", "checkpoint_every=2", "eval_tokens=256"]


class Text:
    """A data set in memory, with what `batches` reads of a `shards.Dataset`."""

    def __init__(self, text):
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        cut = len(data) * 4 // 5
        self.train, self.valid = (Tokens([d], len(d), np.array([0, len(d)])) for d in (data[:cut], data[cut:]))
        self.meta = {"corpus": f"text of {len(data)} bytes", "tokenizer": "bytes"}


TEXT = Text("The jay laughs. A thrush sings, and the babbler answers: who is there? Nobody; only a wren! " * 60)


def make(folder, overrides=(), family=GPT):
    """The `Run` of a tiny model on the text."""
    s, config = settings.read_settings(None, [*family, *SHORT, *overrides])
    data = batches.make_data(TEXT, s, config, ByteTokenizer(GLM_SPECIALS))
    return loop.Run(config, s, data, pathlib.Path(folder))


def train(folder, overrides=(), family=GPT, **options):
    """The result of a tiny run, and what it printed."""
    out = io.StringIO()
    return loop.train(make(folder, overrides, family), out=out, **options), out.getvalue()
