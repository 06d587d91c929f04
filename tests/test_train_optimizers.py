import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from garrulax import models
from garrulax.core import spec
from garrulax.train.layer_rates import layer_factors
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = {
    "gpt": models.gpt.Config(vocab=40, context=8, width=16, layers=3, heads=2),
    "glm": models.glm.Config(vocab=40, context=8, width=16, layers=3, heads=2),
    "llama": models.llama.Config(vocab=40, context=8, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24),
}
FLAT = {"schedule": "constant", "warmup": 0.0}


def tree(config):
    return models.family(config).parameters(config)


def init(config):
    """Parameters, whatever their values: nothing is compiled for them."""
    return jax.tree.map(lambda p: 0.02 * p, noise(spec.abstract(tree(config)), seed=9))


def noise(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


def update(settings, config, gradients, params):
    optimizer = make_optimizer(settings, tree(config))
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


@pytest.mark.parametrize("family", CONFIGS)
def test_adamw_decays_what_is_no_vector(family):
    config = CONFIGS[family]
    params = jax.tree.map(jnp.ones_like, init(config))
    settings = Settings(optimizer="adamw", lr=0.1, weight_decay=0.5, **FLAT)
    updates = spec.named_specs(update(settings, config, jax.tree.map(jnp.zeros_like, params), params))
    for name, s in spec.named_specs(tree(config)).items():
        expected = 0.0 if name.endswith(("bias", "scale", "norm")) or s.role == "vector" else -0.1 * 0.5
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6, err_msg=name)


def test_gradients_are_clipped_by_their_norm_before_adam():
    config = CONFIGS["gpt"]
    params = init(config)
    gradients = noise(params)
    # Adam's first update is g / (|g| + eps): a large eps shows the size of the clipped gradient.
    settings = Settings(optimizer="adamw", lr=1.0, weight_decay=0.0, clip=0.01, eps=1e3, **FLAT)
    updates = update(settings, config, gradients, params)
    clipped = jax.tree.map(lambda g: g * 0.01 / optax.tree.norm(gradients), gradients)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -g / (1e3 + abs(g)), rtol=1e-4), updates, clipped)
    unclipped = update(Settings(optimizer="adamw", lr=1.0, clip=0.0, eps=1e3, **FLAT), config, gradients, params)
    assert optax.tree.norm(unclipped) > 10 * optax.tree.norm(updates)


def test_muon_is_optax_muon_on_plain_matrices():
    with jax.enable_x64(True):
        compare_with_optax_muon()


def compare_with_optax_muon():
    shapes = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
    specs = {}
    for name, (inputs, outputs) in shapes.items():
        specs |= spec.Declare(spec.normal(1.0), I=inputs, O=outputs).linear(name, name, "O I -> I O")
    specs["table"] = spec.Declare(spec.normal(1.0), V=9, D=4).embedding("table")
    params = spec.init(specs, jax.random.key(0), "float64")
    settings = Settings(lr=0.02, adam_lr=0.003, weight_decay=0.1, clip=0.0, **FLAT)
    ours = make_optimizer(settings, specs)
    matrices = lambda p: {k: v for k, v in p.items() if k != "table"}  # noqa: E731
    theirs = optax.contrib.muon(0.02, beta=0.95, weight_decay=0.1)
    adam = optax.adamw(0.003, 0.9, 0.99, 1e-8, weight_decay=0.1)
    state, muon_state, adam_state = ours.init(params), theirs.init(matrices(params)), adam.init(params["table"])
    for i in range(3):
        gradients = noise(params, i)
        got, state = jax.jit(ours.update)(gradients, state, params)
        expected, muon_state = jax.jit(theirs.update)(matrices(gradients), muon_state, matrices(params))
        table, adam_state = jax.jit(adam.update)(gradients["table"], adam_state, params["table"])
        for name, value in {**expected, "table": table}.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)  # Optax corrects Adam's first
            # steps in float32


@pytest.mark.parametrize("family", CONFIGS)
def test_muon_orthogonalises_every_layer_on_its_own(family):
    config = CONFIGS[family]
    params = init(config)
    gradients = noise(params)
    # One layer's gradients are a million times larger: orthogonalised alone, its updates are no larger.
    scale = jnp.array([1e-3, 1e3, 1.0])
    gradients["blocks"] = jax.tree.map(lambda g: g * scale.reshape(3, *[1] * (g.ndim - 1)), gradients["blocks"])
    updates = spec.named_specs(update(Settings(lr=1.0, clip=0.0, **FLAT), config, gradients, params))
    seen = 0
    for name, s in spec.named_specs(tree(config)).items():
        if s.role != "matrix":
            continue
        seen += 1
        inputs = int(np.prod(s.layer_shape[: s.inputs]))
        for layer in np.asarray(updates[name]).reshape(3, inputs, -1):
            sizes = np.linalg.svd(layer, compute_uv=False) / np.sqrt(max(1, layer.shape[1] / inputs))
            assert sizes.min() > 0.3, name
            assert sizes.max() < 1.3, name
    assert seen >= 4


def steps(settings, specs, params, count=3):
    """Updates of some steps with the parameters moving, by name."""
    optimizer = make_optimizer(settings, specs)
    state, found, step = optimizer.init(params), [], jax.jit(optimizer.update)
    for i in range(count):
        updates, state = step(noise(params, i), state, params)
        params = optax.apply_updates(params, updates)
        found.append(spec.named_specs(updates))
    return found


def test_lion_is_its_formula():
    """Chen et al. 2023, algorithm 2, in float64."""
    config = CONFIGS["gpt"]
    params = init(config)
    settings = Settings(optimizer="lion", lr=0.01, weight_decay=0.5, clip=0.0, **FLAT)
    p = {k: v.astype(np.float64) for k, v in spec.named_specs(params).items()}
    m = dict.fromkeys(p, 0.0)
    for i, got in enumerate(steps(settings, tree(config), params)):
        for name, g in spec.named_specs(noise(params, i)).items():
            decay = 0.0 if spec.named_specs(tree(config))[name].role == "vector" else 0.5
            expected = -0.01 * (np.sign(0.9 * m[name] + 0.1 * g) + decay * p[name])
            np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-7, err_msg=name)
            m[name], p[name] = 0.99 * m[name] + 0.01 * g, p[name] + expected


def test_adafactor_is_optax_adafactor_on_the_matrix_of_each_layer():
    declare = spec.Declare(spec.normal(1.0), D=130, H=4, C=33, V=129)
    layer = declare.linear("query", "{}.q", "(H C) D -> D H C", bias=True)
    specs = {"blocks": spec.stacked(2, layer), "tokens": declare.embedding("t")}
    params = jax.tree.map(lambda p: 0.1 * p, noise(spec.abstract(specs), 7))
    settings = Settings(optimizer="adafactor", lr=0.01, clip=0.0, **FLAT)
    found = steps(settings, specs, params)
    for name, shape in {"blocks/query": (2, 130, 132), "blocks/query_bias": (2, 132), "tokens": (1, 129, 130)}.items():

        def layers(tree, name=name, shape=shape):
            return np.reshape(spec.named_specs(tree)[name], shape)

        for layer, p in enumerate(layers(params)):
            theirs = optax.adafactor(0.01)
            state, step = theirs.init(p), jax.jit(theirs.update)
            for i, got in enumerate(found):
                expected, state = step(layers(noise(params, i))[layer], state, p)
                p = p + expected
                np.testing.assert_allclose(np.reshape(got[name], shape)[layer], expected, rtol=2e-4, atol=1e-7)
    rows = [x.shape for x in jax.tree.leaves(make_optimizer(settings, specs).init(params))]
    assert max(int(np.prod(shape)) for shape in rows) == 2 * 132  # a row and a column of each matrix, not the matrix


def test_lower_layers_learn_more_slowly():
    config, params = CONFIGS["gpt"], init(CONFIGS["gpt"])
    plain, slow = (
        steps(Settings(optimizer="adamw", layer_decay=d, **FLAT), tree(config), params, 1)[0] for d in (1.0, 0.5)
    )
    expected = {"tokens": 1 / 16, "positions": 1 / 16, "norm/scale": 1.0}
    for name, update in slow.items():
        factor = expected.get(name, 1.0)
        if name.startswith("blocks"):
            factor = np.array([1 / 8, 1 / 4, 1 / 2]).reshape(3, *[1] * (update.ndim - 1))
        np.testing.assert_allclose(update, plain[name] * factor, rtol=1e-6, err_msg=name)
    head = layer_factors(
        models.parameters(models.llama.Config(vocab=9, width=8, heads=2, kv_heads=2, layers=2, tied=False)), 0.5
    )
    assert (head["head"], head["tokens"], head["norm"]["scale"]) == (1, 1 / 8, 1)
