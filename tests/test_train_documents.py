"""Packed documents that do not see one another in training: loss and gradients are those of the documents alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import training

from garrulax import models
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train import batches, components, settings
from garrulax.train.documents import isolated_infill, segments_at
from garrulax.train.infill import BlankMix, infill_batch, source_window
from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.objectives import mask_of, negative_log_likelihood
from garrulax.train.tokens import Tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Documents:
    """A data set of short documents, as `shards.Dataset`."""

    def __init__(self, lengths, vocab, seed=0):
        ids = np.random.default_rng(seed).integers(1, vocab, sum(lengths)).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self.train = self.valid = Tokens([ids], len(ids), starts)
        self.meta = {"corpus": "documents", "tokenizer": "none"}


def compiled(config):
    """(params, batch) -> ((loss, logits), gradients) of the sum over the weighted targets."""

    def total(params, batch):
        logits, _ = models.forward(
            params, batch["tokens"], config, positions=batch.get("positions"), mask=mask_of(batch)
        )
        return jnp.sum(negative_log_likelihood(logits, batch["targets"]) * batch["weights"]), logits

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def assert_equal_sums(packed, alone, same):
    """Equal losses, gradients, and logits at the places `same`, a pair of indices into [B, T]."""
    (loss, logits), gradients = packed
    (loss_alone, logits_alone), gradients_alone = alone
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    np.testing.assert_allclose(logits[same[0]], logits_alone[same[1]], rtol=2e-4, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), gradients, gradients_alone)


LLAMA = tiny.CONFIGS["llama"]
CONFIGS = {name: config for name, config in tiny.CONFIGS.items() if models.blanks(config) is None and name != "dynamic"}
CONFIGS |= {
    "window": dataclasses.replace(LLAMA, window=3, dialect="mistral"),
    "alibi": dataclasses.replace(LLAMA, positions="alibi", kv_heads=4, dialect="baichuan"),
    "banded": dataclasses.replace(tiny.CONFIGS["gpt"], band=3),
}
FAST = [("gpt", "causal"), ("window", "causal"), ("falcon", "prefix")]


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        pytest.param(name, objective, marks=() if (name, objective) in FAST else pytest.mark.slow)
        for name in CONFIGS
        for objective in ("causal", "prefix")
    ],
)
def test_a_document_is_as_if_it_were_alone(name, objective):
    config = CONFIGS[name]
    lengths = [5, 1, 9, 3, 4, 9]
    dataset = Documents(lengths, config.vocab)
    params, run = tiny.params(config), compiled(config)
    ids = np.split(dataset.train[:], np.cumsum(lengths)[:-1])
    for packing in ("cut", "first_fit"):
        s = settings.Settings(window=15, batch=2, isolate=True, packing=packing, corpus=("x",))
        (batch,) = components.causal(dataset, s, 0, prefix=objective == "prefix").held_out()
        batch.pop("bytes")
        if packing == "cut":  # rows of 15 targets: the documents 0, 1, 2, and 3, 4, 5
            assert batch["segment"][0].tolist() == [0] * 5 + [1] + [2] * 9
        else:  # 8 + 4 + 3 targets fill the first row
            assert (batch["segment"] >= 0).sum(axis=1).tolist() == [15, 10]
        if objective == "causal":
            assert batch["weights"].sum() == sum(lengths) - len(lengths)  # every token but the first of a document
        alone, packed_at, alone_at = separate(batch, ids)
        assert_equal_sums(run(params, batch), run(params, alone), (packed_at, alone_at))


def separate(batch, ids):
    """Every document in a row of its own, with the prefix that it has in a batch, and where its places are in both."""
    size = max(map(len, ids))
    rows = np.zeros((len(ids), size), np.int32)
    for row, document in enumerate(ids):
        rows[row, : len(document)] = document
    targets = np.array([len(document) - 1 for document in ids])[:, None]
    here = np.arange(size - 1) < targets
    places = np.argwhere(batch["segment"] >= 0)
    owner = np.array([next(i for i, d in enumerate(ids) if _begins(d, batch, *place)) for place in places])
    inside = batch["positions"][tuple(places.T)]
    has_target = inside < targets[owner, 0]
    packed_at, alone_at = tuple(places[has_target].T), (owner[has_target], inside[has_target])
    weights = np.zeros(here.shape, np.float32)
    weights[alone_at] = batch["weights"][packed_at]
    alone = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}
    if "rank" in batch:
        rank = np.tile(np.arange(size - 1), (len(ids), 1))
        begin = packed_at[1] - inside[has_target]
        rank[alone_at] = batch["rank"][packed_at] - begin
        alone |= {"rank": rank.astype(np.int32), "segment": np.where(here, 0, -1).astype(np.int32)}
    return alone, packed_at, alone_at


def _begins(document, batch, row, place):
    """Whether a document begins where the positions of this place say that its document begins."""
    begin = place - batch["positions"][row, place]
    return batch["tokens"][row, begin : place + 1].tolist() == document[: place - begin + 1].tolist()


@pytest.mark.parametrize(
    "family",
    [training.GLM, training.GLM_130B, pytest.param(training.CHATGLM, marks=pytest.mark.slow)],
    ids=["glm", "glm-130b", "chatglm-6b"],
)
def test_an_infilled_document_is_as_if_it_were_alone(family):
    tokenizer = ByteTokenizer(GLM_SPECIALS)
    _, config = settings.read_settings(None, family)
    blanks = models.blanks(config)
    ids = InfillTokens.of(tokenizer) if blanks.before else InfillTokens.of_blanks(tokenizer, blanks)
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
            assert ids.cls in (None, packed["tokens"][row, here][0])
            one = infill_batch(windows[:1], [0], 0, ids, 64)  # its arrays, to be overwritten
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
    run = compiled(config)
    places = np.argwhere(packed["segment"] >= 0)  # in the order of the documents
    here = np.argwhere(rows["segment"] >= 0)
    assert_equal_sums(run(params, packed), run(params, rows), (tuple(places.T), tuple(here.T)))


@pytest.mark.parametrize("family", [training.GPT, training.GLM])
def test_training_and_evaluation_isolate(family, tmp_path):
    s, config = settings.read_settings(None, [*family, *training.SHORT, "isolate=true"])
    dataset = Documents([7, 12, 3, 30, 5, 18] * 8, 250)
    data = batches.make_data(dataset, s, config, ByteTokenizer(GLM_SPECIALS))
    for batch in (data.batch_at(0), data.batch_at(5), next(data.held_out())):
        assert batch["segment"].max() > 0
        assert batch["weights"].sum() > 0
    np.testing.assert_array_equal(data.batch_at(3)["tokens"], data.batch_at(3)["tokens"])
