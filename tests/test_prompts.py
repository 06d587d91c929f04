"""Prompts, prefixes and instruction data: what is read, what is predicted, and who sees whom."""

import json

import numpy as np
import pytest
import training

from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.train import batches, settings
from garrulax.train.corpus import Corpus
from garrulax.train.shards import build_shards

TOKENIZER = ByteTokenizer(GLM_SPECIALS)
PAIRS = [(f"{i} plus {i}? ", f"It is {2 * i}.") for i in range(60)]
GLM_130B, CHATGLM = training.GLM_130B, training.CHATGLM


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS] + [json.dumps({"text": "plain text " * 9})]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return build_shards(Corpus(folder / "pairs.jsonl", fraction=0.1), TOKENIZER, folder / "cache")


def data_of(dataset, family, *words):
    s, config = settings.read_settings(None, [*family, "batch=8", "window=32", *words])
    return batches.make_data(dataset, s, config, TOKENIZER)


def rows_of(batch):
    """The documents of a batch as {array name: values}, one after the other."""
    for row in range(len(batch["tokens"])):
        for segment in range(batch["segment"][row].max() + 1):
            here = batch["segment"][row] == segment
            yield {name: value[row][..., here] for name, value in batch.items()}


def predicted(document):
    return bytes(int(t) for t in document["targets"][document["weights"] > 0] if t < 256).decode()


@pytest.mark.parametrize("packing", ["packing=first_fit", "isolate=true"])
def test_of_a_prompt_longer_than_a_row_nothing_is_predicted(tmp_path, packing):
    lines = [json.dumps({"prompt": "read this " * 20, "completion": "DONE" * n}) for n in range(1, 30)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    long = build_shards(Corpus(tmp_path / "long.jsonl", fraction=0.1), TOKENIZER, tmp_path / "cache")
    for family in (training.GPT, training.GLM):
        batches_of = data_of(long, family, packing)
        texts = [predicted(document) for step in range(8) for document in rows_of(batches_of.batch_at(step))]
        assert set("".join(texts)) == set("DONE"), family


@pytest.mark.parametrize("packing", ["packing=first_fit", "isolate=true"])
def test_only_completions_are_predicted(dataset, packing):
    wanted = {f"{p}{c}": c for p, c in PAIRS}
    found = 0
    for step in range(20):
        for document in rows_of(data_of(dataset, training.GPT, packing).batch_at(step)):
            ids = [*document["tokens"].tolist(), int(document["targets"][-1])]
            text = bytes(ids[: ids.index(256)]).decode() if 256 in ids else ""
            if text in wanted:
                assert predicted(document) == wanted[text]
                found += 1
    assert found > 30


def test_prefixes_see_themselves_and_are_not_predicted(dataset):
    data = data_of(dataset, training.GPT, "objective=prefix", "packing=first_fit")
    batch, lengths, plain = data.batch_at(0), [], 0
    for step in range(40):
        batch = data.batch_at(step)
        rank, segment, place = batch["rank"], batch["segment"], np.arange(32)
        sees = (rank[:, None] <= rank[:, :, None]) & (segment[:, None] == segment[:, :, None])  # [B, query, key]
        for row in range(8):
            for number in range(segment[row].max() + 1):
                (at,) = np.flatnonzero(segment[row] == number)[:1]
                here = place[segment[row] == number]
                weights = batch["weights"][row, here]
                prefix = int(len(weights) - weights.sum() + 1)  # its last token predicts
                inside = here[:prefix]
                assert sees[row][np.ix_(inside, inside)].all()
                for query in here[prefix:]:
                    assert (np.flatnonzero(sees[row, query]) == np.arange(at, query + 1)).all()
                text = bytes(batch["tokens"][row, here].tolist()).decode()
                if " plus " in text:
                    assert prefix == next(len(p) for p, c in PAIRS if text.startswith(p))
                elif len(here) == 32:
                    plain, lengths = plain + 1, [*lengths, prefix]
    # Uniform over 1..31: mean 16, standard deviation 8.9.
    assert np.mean(lengths) == pytest.approx(16, abs=4 * 8.9 / np.sqrt(plain))
    assert min(lengths) < 6
    assert max(lengths) > 26


@pytest.mark.parametrize("family", [training.GLM, GLM_130B, CHATGLM], ids=["glm", "glm-130b", "chatglm-6b"])
def test_a_completion_is_the_answer_to_a_gmask_behind_its_prompt(dataset, family):
    data = data_of(dataset, family, "packing=first_fit")
    found = 0
    for step in range(6):
        for document in rows_of(data.batch_at(step)):
            ids = document["tokens"].tolist()
            first = int(document["weights"].argmax())
            if ids[first - 1] != 260 or ids[first] != 261:
                continue
            text = bytes(t for t in ids[: first - 1] if t < 256).decode()
            pair = next(((p, c) for p, c in PAIRS if p == text), None)
            if pair is None:
                continue
            found += 1
            assert predicted(document) == pair[1]
            assert document["targets"][-1] == (256 if family is CHATGLM else 262)
            places = np.atleast_2d(document["positions"])[0]
            after = np.arange(len(ids) - first)
            np.testing.assert_array_equal(places[first:], first - 1 + (after + 1) * (family is GLM_130B))
    assert found > 10


def test_prompts_must_be_kept_apart(dataset):
    for family, objective in ((training.GLM, "infill"), (training.GPT, "prefix")):
        with pytest.raises(ValueError, match=f"objective={objective}: documents with prompts must be kept apart"):
            data_of(dataset, family, f"objective={objective}")
    with pytest.raises(ValueError, match="objective=infill: models of the family gpt have no blanks"):
        data_of(dataset, training.GPT, "objective=infill")
    with pytest.raises(ValueError, match="objective=causal: models of the family glm130b fill blanks"):
        data_of(dataset, GLM_130B, "objective=causal")


def test_another_text_is_refused_unless_told(dataset):
    s, config = settings.read_settings(None, training.GPT)
    data = data_of(dataset, training.GPT)
    saved = settings.run_identity(s, config, {"corpus": "old", "tokenizer": data.identity["tokenizer"]})
    now = settings.run_identity(s, config, data.identity)
    assert "data.corpus" in settings.differences(now, saved)[0]
    told = settings.run_identity(s, config, batches.with_new_text(data, saved["data"]).identity)
    assert settings.differences(told, saved) == []
    assert settings.differences(now, told) == []  # the run goes on with it
