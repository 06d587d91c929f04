"""Glitch tokens: found where they were planted and where training left them, and nowhere else."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import garrulax as gx
from garrulax import models
from garrulax.cli import main
from garrulax.cli.glitch import plot
from garrulax.core import sharding, spec
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models import glitch

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 60
_SMALL = {"vocab": VOCAB, "context": 32, "width": 32, "layers": 1, "heads": 2, "bos": None, "eos": None}
TRAINED = {
    "tied": models.gpt.Config(**_SMALL),
    "untied": models.llama.Config(**_SMALL, kv_heads=2, mlp_width=64),
}


def fit(config, batches):
    optimizer = optax.adamw(3e-3, weight_decay=0.1)

    @jax.jit
    def step(params, state, tokens):
        def loss(p):
            logits, _ = gx.forward(p, tokens[:, :-1], config, unroll=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = gx.init(config, jax.random.key(0))
    state = optimizer.init(params)
    for tokens in batches:
        params, state = step(params, state, tokens)
    return params


@functools.cache
def trained(kind, unused, steps=300):
    """(params, ids that training never met) of a model that learned noisy counting on the other ids."""
    rng = np.random.default_rng(1)
    missing = np.sort(rng.choice(VOCAB, unused, replace=False))
    used = rng.permutation(np.setdiff1d(np.arange(VOCAB), missing))

    def batch():
        jumps = rng.integers(1, 4, (16, 17)).cumsum(1) + rng.integers(0, len(used), (16, 1))
        return used[jumps % len(used)]

    return fit(TRAINED[kind], (batch() for _ in range(steps))), missing


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "unused"),
    [("tied", 15), ("untied", 15), slow("untied", 4), slow("untied", 45), slow("tied", 4), slow("tied", 45)],
)
def test_tokens_that_real_training_never_met_are_found_exactly(kind, unused):
    """A few, a quarter, three quarters of the vocabulary: recall and precision 1 on every side."""
    params, missing = trained(kind, unused)
    found = gx.glitch_tokens((params, TRAINED[kind]))
    assert list(found.sides) == (["input"] if kind == "tied" else ["input", "output"])
    for name, side in found.sides.items():
        np.testing.assert_array_equal(np.flatnonzero(side.flagged), missing, name)
    assert found.count == unused == len(found.tokens)
    assert {token.id for token in found.tokens} == set(missing)
    assert [token.rank for token in found.tokens] == [*range(1, unused + 1)]


@pytest.mark.parametrize("unused", [slow(4), 15, slow(45)])
def test_scores_are_distances_to_the_mean_of_the_unused_rows(unused):
    """As Land & Bartolo take them where the unused tokens are known, leaving the row itself out; here in float64."""
    params, missing = trained("untied", unused)
    for name, table in (("input", "tokens"), ("output", "head")):
        rows = np.asarray(params[table], np.float64)
        distances = np.linalg.norm(rows - rows[missing].mean(0), axis=1)
        for i in missing:
            distances[i] = np.linalg.norm(rows[i] - rows[np.setdiff1d(missing, i)].mean(0))
        got = gx.glitch_tokens((params, TRAINED["untied"]), side=name).sides[name].scores
        np.testing.assert_allclose(got, distances / distances.mean(), rtol=1e-5)


def bulk(rng, vocab, width):
    """Rows as training leaves them: of many lengths, more in some directions than in others, around a shared mean."""
    rows = (
        rng.normal(size=(vocab, width))
        * np.exp(0.5 * rng.normal(size=width))
        * np.exp(0.25 * rng.normal(size=(vocab, 1)))
    )
    return rows + 0.5 * rng.normal(size=width)


def planted(kind, count, noise, dtype, where="centroid", vocab=3000, width=64):
    """(params, config, planted ids): rows of noise around the centroid, or far out in its direction."""
    rng = np.random.default_rng(count)
    ids = np.sort(rng.choice(vocab, count, replace=False))
    tables = {}
    for name in ("tokens", "head")[: 1 + (kind == "untied")]:
        rows = bulk(rng, vocab, width)
        centre = rows.mean(0) * (1 if where == "centroid" else 6)
        rows[ids] = centre + noise * rows.std() * rng.normal(size=(count, width))
        tables[name] = jnp.asarray(rows, dtype)
    sizes = {"vocab": vocab, "width": width, "heads": 4, "layers": 1}
    config = models.gpt.Config(**sizes) if kind == "tied" else models.llama.Config(**sizes, kv_heads=4, head_dim=16)
    return tables, config, ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", slow("float16")])
@pytest.mark.parametrize("noise", [0.0, slow(0.02), 0.2])
@pytest.mark.parametrize("count", [20, slow(300), 2000])
@pytest.mark.parametrize("kind", TRAINED)
def test_planted_rows_are_found(kind, count, noise, dtype):
    """All of them, and of others no more than one in fifty, from exact copies of the centroid to rows near the rest."""
    params, config, ids = planted(kind, count, noise, dtype)
    found = gx.glitch_tokens((params, config))
    for side in found.sides.values():
        assert side.flagged[ids].all()
        assert side.flagged.sum() <= 1.02 * count
    assert {token.id for token in found.tokens[: int(0.9 * count)]} <= set(ids)


def test_rows_of_zeros_are_found_among_few_and_among_many_others():
    for count in (1, 30, 2500):
        params, config, ids = planted("untied", count, 0.0, "float32")
        params = {name: rows.at[ids].set(0.0) for name, rows in params.items()}
        for side in gx.glitch_tokens((params, config)).sides.values():
            assert side.flagged[ids].all()
            assert side.flagged.sum() <= count + 60


@pytest.mark.parametrize("count", [1, 3])
def test_a_single_planted_row_is_found(count):
    params, config, ids = planted("untied", count, 0.02, "float32")
    found = gx.glitch_tokens((params, config))
    assert {token.id for token in found.tokens} == set(ids)
    assert all(token.flagged == ("input", "output") for token in found.tokens)


def test_rows_pushed_along_the_common_direction_are_found():
    params, config, ids = planted("untied", 40, 0.05, "bfloat16", where="pushed")
    output = gx.glitch_tokens((params, config), side="output")
    assert {token.id for token in output.tokens} == set(ids)
    assert output.sides["output"].start == "the rows farthest along the mean"
    centroid = np.asarray(params["head"], np.float32)
    centroid = np.linalg.norm(centroid - centroid.mean(0), axis=1)
    assert (centroid[ids] > np.median(centroid)).all()  # where the distance to the mean of all rows would miss them


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_nothing_stands_apart_in_an_untrained_model(family):
    """No row has been trained, so none is nearer than noise makes it: nothing is flagged (and not everything)."""
    config = dataclasses.replace(tiny.CONFIGS[family], vocab=400)
    specs = models.family(config).parameters(config)
    specs = {name: specs[name] for name in glitch.SIDES.values() if name in specs}
    for seed in range(5):
        found = gx.glitch_tokens((spec.init(specs, jax.random.key(seed)), config))
        assert found.count == 0
        assert found.tokens == ()
        assert all(side.threshold is None for side in found.sides.values())


def test_nothing_stands_apart_where_every_row_was_trained():
    rng = np.random.default_rng(0)
    for vocab, width in ((500, 32), (20000, 64), (3000, 256)):
        for _ in range(3):
            config = models.llama.Config(vocab=vocab, width=width, heads=4, kv_heads=4, head_dim=8, layers=1)
            params = {name: jnp.asarray(bulk(rng, vocab, width)) for name in ("tokens", "head")}
            assert gx.glitch_tokens((params, config)).count == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_in_real_text_what_is_flagged_besides_the_unseen_is_rare(kind):
    """Bytes of the standard library: 160 of 256 never occur. Those all, and of others only bytes seen a few times."""
    files = sorted(pathlib.Path(pathlib.__file__).parent.glob("*.py"))[:40]
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    config = dataclasses.replace(TRAINED[kind], vocab=256)
    seen = np.zeros(256, int)

    def batches(rng):
        for _ in range(400):
            tokens = np.stack([text[start : start + 33] for start in rng.integers(0, len(text) - 33, 16)])
            np.add.at(seen, tokens.ravel(), 1)
            yield tokens.astype(np.int32)

    params = fit(config, batches(np.random.default_rng(0)))
    for side in gx.glitch_tokens((params, config)).sides.values():
        assert side.flagged[seen == 0].all()
        assert seen[side.flagged].max() < 20 < np.median(seen[seen > 0])


def test_padding_rows_are_marked_come_last_and_move_no_threshold():
    params, config, ids = planted("untied", 20, 0.1, "float32")
    vocab = config.vocab + 100
    padded = {name: jnp.concatenate([rows, jnp.zeros((100, 64))]) for name, rows in params.items()}
    model = tiny.Model(dataclasses.replace(config, vocab=vocab), padded, Words(config.vocab))
    plain = gx.glitch_tokens(tiny.Model(config, params, Words(config.vocab)))
    found = gx.glitch_tokens(model)
    assert found.count == plain.count == 20
    assert found.vocab == plain.vocab == config.vocab
    assert {token.id for token in found.tokens[:20]} == set(ids)
    assert [token.kind for token in found.tokens[20:]] == ["padding"] * (len(found.tokens) - 20)
    assert all(token.id >= config.vocab for token in found.tokens[20:])
    for name, side in found.sides.items():
        np.testing.assert_allclose(side.scores[: config.vocab], plain.sides[name].scores, rtol=1e-4)


class Words:
    """A tokenizer whose token i is the text `i`; token 5 is half a character, token 7 a control token."""

    def __init__(self, vocab):
        self.vocab, self.specials = vocab, {"<|end|>": 7}

    def token_bytes(self, token):
        return b"" if token == 7 else b"\xc3" if token == 5 else str(token).encode()


def test_tokens_are_named():
    params, config, _ = planted("tied", 20, 0.1, "float32", vocab=100)
    found = gx.glitch_tokens(tiny.Model(config, params, Words(98)), top=100)
    tokens = {token.id: token for token in found.tokens}
    assert (tokens[5].text, tokens[5].kind) == ("\\xc3", "text")
    assert (tokens[7].text, tokens[7].kind) == ("<|end|>", "control")
    assert (tokens[12].text, tokens[12].kind) == ("12", "text")
    assert (tokens[99].text, tokens[99].kind) == ("", "padding")
    assert [token.id for token in found.tokens[98:]] == sorted((98, 99), key=lambda i: found.sides["input"].scores[i])
    assert gx.glitch_tokens((params, config), top=1).tokens[0].text is None


def test_sharded_parameters_give_the_same():
    config = dataclasses.replace(TRAINED["untied"], vocab=VOCAB)
    params, missing = trained("untied", 15)
    expected = gx.glitch_tokens((params, config))
    places = sharding.shardings(models.family(config).parameters(config), gx.make_mesh("fsdp=4,tensor=2"))
    found = gx.glitch_tokens((jax.device_put(params, places), config))
    assert {token.id for token in found.tokens} == set(missing)
    for name, side in found.sides.items():
        np.testing.assert_allclose(side.scores, expected.sides[name].scores, rtol=1e-5)


def test_a_pass_makes_nothing_of_the_tables_size():
    table = jax.ShapeDtypeStruct((50_000, 1024), jnp.bfloat16)
    row, rows = jax.ShapeDtypeStruct((1024,), jnp.float32), jax.ShapeDtypeStruct((50_000,), bool)
    for compute, argument in ((glitch._distances, row), (glitch._projections, row), (glitch._mean, rows)):
        memory = compute.lower(table, argument).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 2 * 4 * (50_000 + 1024)


def test_misuse_is_named():
    params, _ = trained("tied", 15)
    config = TRAINED["tied"]
    with pytest.raises(ValueError, match="side 'output' is not there: the tables of this model are input"):
        gx.glitch_tokens((params, config), side="output")
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        gx.glitch_tokens((params, config), top=0)
    with pytest.raises(TypeError, match=r"a model is what gx\.load returns"):
        gx.glitch_tokens(params)
    broken = {**params, "tokens": params["tokens"].at[3, 2].set(jnp.nan)}
    with pytest.raises(ValueError, match="the input embedding of token 3 is not finite"):
        gx.glitch_tokens((broken, config))


def test_the_plot_shows_what_is_flagged(tmp_path):
    image = pytest.importorskip("matplotlib.image")

    def red(params):
        config = TRAINED["untied"]
        plot(gx.glitch_tokens((params, config)), tmp_path / "glitch.png", "tiny")
        picture = image.imread(tmp_path / "glitch.png")[..., :3]
        assert picture.shape[0] > 600
        return (np.abs(picture - np.array([0xD1, 0x49, 0x5B]) / 255).max(-1) < 0.02).sum()

    assert red(trained("untied", 15)[0]) > 5 * red(gx.init(TRAINED["untied"], jax.random.key(0)))


def test_the_command_lists_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    params, _ = trained("untied", 15)
    config = dataclasses.replace(TRAINED["untied"], vocab=300)
    rng = np.random.default_rng(0)
    for name in ("tokens", "head"):  # 60 trained rows and 197 copies of them, moved; then padding
        rows = np.asarray(params[name])
        more = rows[rng.integers(0, VOCAB, 240)] + 0.3 * rng.normal(size=(240, 32)) * rows.std()
        params = {**params, name: jnp.asarray(np.concatenate([rows, more]), jnp.float32)}
    model = gx.Model(config, params, ByteTokenizer())
    gx.save(model, tmp_path / "model")
    picture = tmp_path / "out.png"
    assert main(["glitch", str(tmp_path / "model"), "--top", "5", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    found = gx.glitch_tokens(model, top=5)
    assert f"{found.count} of 257 tokens look untrained" in out
    for token in found.tokens:
        assert repr(token.text) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["glitch", str(tmp_path / "model"), "--top", "0"]) == 2
    assert "top=0 must be at least 1" in capsys.readouterr().err
    assert gx.load(tmp_path / "model", only=("tokens",)).params.keys() == {"tokens"}
