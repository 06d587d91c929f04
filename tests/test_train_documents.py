"""Packed documents that do not see one another in training: loss and gradients are those of the documents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import training

from garrulax import models
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train import batches, settings
from garrulax.train.documents import isolated_infill, segments_at
from garrulax.train.infill import BlankMix, source_window
from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.objectives import OBJECTIVES
from garrulax.train.tokens import Tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")
FAST = ("gpt", "llama", "falcon")


class Documents:
    """A data set of short documents, as `shards.Dataset`."""

    def __init__(self, lengths, vocab, seed=0):
        ids = np.random.default_rng(seed).integers(1, vocab, sum(lengths)).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self.train = self.valid = Tokens([ids], len(ids), starts)
        self.meta = {"corpus": "documents", "tokenizer": "none"}


def loss_and_gradients(config, params, batch, objective="causal"):
    def total(params):
        mean, aux = OBJECTIVES[objective](params, batch, config)
        return mean * aux["tokens"]

    return jax.jit(jax.value_and_grad(total))(params)


def assert_equal_sums(packed, alone):
    np.testing.assert_allclose(packed[0], alone[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), packed[1], alone[1])


@pytest.mark.parametrize(
    "name",
    [
        n if n in FAST else pytest.param(n, marks=pytest.mark.slow)
        for n in tiny.CONFIGS
        if n not in ("glm", "glm130b", "dynamic")
    ],
)
def test_a_causal_document_is_as_if_it_were_alone(name):
    config = tiny.CONFIGS[name]
    if models.blanks(config) is not None:
        pytest.skip("fills blanks")
    lengths = [5, 1, 9, 3, 4, 9]
    dataset = Documents(lengths, config.vocab)
    s = settings.Settings(window=15, batch=2, isolate=True, corpus=("x",))
    (batch,) = batches.causal_data(dataset, s).held_out()  # rows of 15 targets: the documents 0, 1, 2, and 3, 4, 5
    batch.pop("bytes")
    assert batch["weights"].sum() == sum(lengths) - len(lengths)  # every token but the first of a document
    assert batch["segment"][0].tolist() == [0] * 5 + [1] + [2] * 9
    alone = np.zeros((len(lengths), max(lengths)), np.int32)
    present = np.zeros(alone.shape, np.float32)
    ids = np.split(dataset.train[:], np.cumsum(lengths)[:-1])
    for row, document in enumerate(ids):
        alone[row, : len(document)], present[row, : len(document)] = document, 1
    plain = {"tokens": alone[:, :-1], "targets": alone[:, 1:], "weights": present[:, 1:]}
    params = tiny.params(config)
    assert_equal_sums(loss_and_gradients(config, params, batch), loss_and_gradients(config, params, plain))


def test_an_infilled_document_is_as_if_it_were_alone():
    tokenizer = ByteTokenizer(GLM_SPECIALS)
    ids = InfillTokens.of(tokenizer)
    _, config = settings.read_settings(None, training.GLM)
    lengths = [6, 2, 9, 1, 12, 20]
    window = source_window(64)
    dataset = Documents([*lengths, 40], 250)
    segments = segments_at(dataset.train.documents, np.array([0, 3]), window + 1)
    windows = dataset.train.windows(np.array([0, 3]), window + 1)
    packed = isolated_infill(windows, segments, [0, 1], 3, ids, 64, BlankMix())
    alone = []
    for row in range(2):
        for segment in range(packed["segment"][row].max() + 1):
            here = packed["segment"][row] == segment
            assert packed["tokens"][row, here][0] == ids.cls
            one = batches.infill_batch(windows[:1], [0], 0, ids, 64)  # its arrays, to be overwritten
            for key, value in one.items():
                value[...] = ids.pad if key in ("tokens", "targets") else -1 if key == "segment" else 0
                value[0, ..., : here.sum()] = (
                    0
                    if key == "segment"
                    else packed[key][row, ..., here].T
                    if key == "positions"
                    else packed[key][row, here]
                )
            alone.append(one)
    assert len(alone) > 6
    assert packed["weights"].sum(axis=1).min() > 3
    rows = {key: np.concatenate([one[key] for one in alone]) for key in packed}
    params = models.init(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p * jnp.float32(3), params)  # far from uniform, so that the context matters
    assert_equal_sums(
        loss_and_gradients(config, params, packed, "infill"), loss_and_gradients(config, params, rows, "infill")
    )


@pytest.mark.parametrize("family", [training.GPT, training.GLM])
def test_training_and_evaluation_isolate(family, tmp_path):
    s, config = settings.read_settings(None, [*family, *training.SHORT, "isolate=true"])
    dataset = Documents([7, 12, 3, 30, 5, 18] * 8, 250)
    data = batches.make_data(dataset, s, config, ByteTokenizer(GLM_SPECIALS))
    for batch in (data.batch_at(0), data.batch_at(5), next(data.held_out())):
        assert batch["segment"].max() > 0
        assert batch["weights"].sum() > 0
    np.testing.assert_array_equal(data.batch_at(3)["tokens"], data.batch_at(3)["tokens"])
