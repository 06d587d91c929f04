"""The families as Linen and NNX modules: the same numbers, the same arrays, the same training."""

import dataclasses
import functools
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen, nnx
from flax.training.train_state import TrainState

import garrulax as gx
from garrulax import models
from garrulax.core import sharding, spec
from garrulax.core.sharding import axis_names
from garrulax.core.strategies import STRATEGIES
from garrulax.flax import linen_module, logical_axes, nnx_module, params_of

#: Those whose trees have a form that another's has are left to `make test-slow`.
FAMILIES = [f if f in ("llama", "glm130b") else pytest.param(f, marks=pytest.mark.slow) for f in tiny.CONFIGS]
TOKENS = np.random.default_rng(0).integers(0, 90, (2, 9))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def reference(family):
    config = tiny.CONFIGS[family]
    params = tiny.params(config)
    return config, params, forward(params, TOKENS, config)[0]


forward = jax.jit(gx.forward, static_argnames="config")


def pointers(tree):
    return {jax.tree_util.keystr(k): x.unsafe_buffer_pointer() for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def close(a, b, bound=2e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() <= bound * max(np.abs(b).max(), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nnx_holds_the_very_arrays_and_gives_the_same_logits(family):
    config, params, expected = reference(family)
    model = nnx_module(config, params=params)
    assert pointers(params_of(model)) == pointers(params)
    assert jax.tree.structure(params_of(model)) == jax.tree.structure(params)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == set(spec.named_specs(models.parameters(config)))
    assert close(jax.jit(lambda m, t: m(t)[0])(model, TOKENS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_linen_takes_the_very_arrays_and_gives_the_same_logits(family):
    config, params, expected = reference(family)
    module = linen_module(config)
    bound = module.bind({"params": params})
    assert pointers(bound.variables["params"]) == pointers(params)
    assert close(jax.jit(module.apply)({"params": params}, TOKENS)[0], expected)
    abstract = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    assert abstract.keys() == {"params"}
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract["params"], params)
    assert all(jax.tree.leaves(same))


def nll(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def test_training_in_nnx_and_in_linen_is_training_in_plain_jax(family):
    config, params, _ = reference(family)
    inputs, targets = jnp.asarray(TOKENS[:, :-1]), jnp.asarray(TOKENS[:, 1:])
    adam = optax.adam(1e-3)

    @jax.jit
    def plain(params, state):
        gradient = jax.grad(lambda p: nll(gx.forward(p, inputs, config)[0], targets))(params)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state

    model = nnx_module(config, params=params)
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda m: nll(m(inputs)[0], targets))(model)
        optimizer.update(model, gradient)
        return value

    module = linen_module(config)
    trained = TrainState.create(apply_fn=module.apply, params=params, tx=adam)

    @jax.jit
    def linen_step(state):
        gradient = jax.grad(lambda p: nll(state.apply_fn({"params": p}, inputs)[0], targets))(state.params)
        return state.apply_gradients(grads=gradient)

    expected, state, values = params, adam.init(params), []
    for _ in range(3):
        expected, state = plain(expected, state)
        values.append(step(model, optimizer))
        trained = linen_step(trained)
    assert values[2] < values[0]
    moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (expected, params)), strict=True))
    for got in (params_of(model), trained.params):
        apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got, expected)
        assert max(jax.tree.leaves(apart)) <= 1e-2 * moved, apart  # Adam divides tiny gradients by their size
        assert jax.tree.structure(got) == jax.tree.structure(expected)


@pytest.mark.parametrize("family", ["glm", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_cache_and_unstacked_layers_go_through(family):
    config, params, expected = reference(family)
    unstacked = gx.unstack(params)
    model, module = nnx_module(config, params=unstacked), linen_module(config)
    assert pointers(params_of(model)) == pointers(unstacked)
    steps = {
        "nnx": jax.jit(lambda m, t, c: m(t, cache=c)),
        "linen": jax.jit(lambda m, t, c: module.apply({"params": unstacked}, t, cache=c)),
    }
    for step in steps.values():
        cache = gx.cache_for(unstacked, config, 2, 16)
        first, cache = step(model, TOKENS[:, :6], cache)
        second, _ = step(model, TOKENS[:, 6:], cache)
        assert close(jnp.concatenate([first, second], 1), expected, 1e-5)


def test_new_parameters():
    config = tiny.CONFIGS["gpt"]
    key = nnx.Rngs(7).params()
    got = params_of(nnx_module(config, rngs=nnx.Rngs(7), dtype=jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, got, gx.init(config, key, dtype=jnp.bfloat16))
    made = jax.jit(linen_module(config, jnp.bfloat16).init)(jax.random.key(7), TOKENS)["params"]
    for a, b in zip(*map(jax.tree.leaves, (made, got)), strict=True):
        assert a.shape == b.shape
        assert a.dtype == jnp.bfloat16
        assert np.std(np.asarray(a, np.float32)) == pytest.approx(np.std(np.asarray(b, np.float32)), rel=0.1)
    assert not np.array_equal(made["tokens"], made["head"])


def test_nothing_is_allocated_for_a_405b():
    config = gx.preset("llama3.1-405b")
    model = nnx.eval_shape(lambda: nnx_module(config, rngs=nnx.Rngs(0)))
    made = jax.eval_shape(linen_module(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    for tree in (params_of(model), made["params"]):
        assert sum(x.size for x in jax.tree.leaves(tree)) == gx.count(config) > 4e11


def test_dropout_comes_from_the_modules_own_rngs():
    config, params, without = reference("gpt")
    model, module = nnx_module(config, params=params), linen_module(config)
    rngs, key = nnx.Rngs(dropout=5), nnx.Rngs(dropout=5).dropout()
    expected, _ = forward(params, TOKENS, config, key=key)
    assert not close(expected, without, 0.01)
    call = nnx.jit(lambda m, t, r: m(t, rngs=r)[0])
    assert close(call(model, TOKENS, rngs), expected)
    assert not close(call(model, TOKENS, rngs), expected, 0.01)  # the stream went on
    assert close(call(model, TOKENS, key), expected)

    @jax.jit
    def apply(seed):
        return module.apply({"params": params}, TOKENS, rngs={"dropout": jax.random.key(seed)})[0]

    derived = linen.apply(lambda m: m.make_rng("dropout"), module)({}, rngs={"dropout": jax.random.key(3)})
    assert close(apply(3), forward(params, TOKENS, config, key=derived)[0])
    assert not close(apply(3), apply(4), 0.01)


def test_hidden_states_feed_heads_of_bigger_modules():
    config, params, expected = reference("llama")

    class Reward(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x, _ = linen_module(config, name="backbone").hidden(tokens)
            return linen.Dense(1)(x)[:, -1, 0]

    made = jax.jit(Reward().init)(jax.random.key(0), TOKENS)["params"]
    assert jax.tree.structure(made["backbone"]) == jax.tree.structure(params)
    got = jax.jit(Reward().apply)({"params": {**made, "backbone": params}}, TOKENS)
    hidden, _ = jax.jit(models.hidden, static_argnums=2)(params, TOKENS, config)
    assert close(got, (hidden @ made["Dense_0"]["kernel"] + made["Dense_0"]["bias"])[:, -1, 0])
    assert close(jax.jit(lambda m, t: m.hidden(t)[0])(nnx_module(config, params=params), TOKENS), hidden)
    assert close(models.family(config).logits(params, hidden, config), expected)


def test_on_a_mesh_with_logical_axes():
    config = dataclasses.replace(tiny.CONFIGS["gpt"], vocab=96)
    params = tiny.params(config)
    expected, _ = forward(params, TOKENS, config)
    mesh = gx.make_mesh("fsdp=4,tensor=2")
    specs = models.family(config).parameters(config)
    rules = [
        (axis, tuple(name for name in axis_names(by) if name in mesh.shape) or None)
        for axis, by in STRATEGIES["hsdp"].rules.items()
    ]
    places = linen.logical_to_mesh_sharding(logical_axes(config), mesh, rules)
    same = jax.tree.map(
        lambda a, b, p: a.is_equivalent_to(b, p.ndim), places, sharding.shardings(specs, mesh, "hsdp"), params
    )
    assert all(jax.tree.leaves(same)), same
    boxed = jax.tree.map(lambda x, axes: linen.LogicallyPartitioned(x, tuple(axes)), params, logical_axes(config))
    assert jax.tree.leaves(linen.get_partition_spec(boxed)) == jax.tree.leaves(logical_axes(config))
    assert close(jax.jit(linen_module(config).apply)({"params": boxed}, TOKENS)[0], expected)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, places)
        model = nnx_module(config, params=sharded)
        assert model.blocks.attention.out.get_value().sharding.is_equivalent_to(places["blocks"]["attention"]["out"], 4)
        assert close(jax.jit(lambda m, t: m(t)[0])(model, TOKENS), expected, 1e-5)


def test_misuse_is_named():
    config, params, _ = reference("gpt")
    with pytest.raises(ValueError, match="give rngs, for new parameters, or params"):
        nnx_module(config)
    with pytest.raises(ValueError, match="give rngs, for new parameters, or params"):
        nnx_module(config, rngs=nnx.Rngs(0), params=params)
    other = {name if name != "norm" else "final": tree for name, tree in params.items()}
    for broken in (
        lambda: nnx_module(config, params=other),
        lambda: linen_module(config).apply({"params": other}, TOKENS),
    ):
        with pytest.raises(ValueError, match="do not fit the config: norm missing, final unknown"):
            broken()
    with pytest.raises(
        ValueError,
        match="do not fit the config: blocks missing, head missing, norm missing, positions missing, tokens missing",
    ):
        linen_module(config).apply({}, TOKENS)
    for make in (linen_module, nnx_module):
        with pytest.raises(TypeError, match="dict is not the Config of a family"):
            make({})
    with pytest.raises(TypeError, match="masks"):
        nnx_module(config, params=params)(TOKENS, masks=None)


def test_linen_and_nnx_are_imported_on_demand_each_for_itself():
    program = (
        "import sys, garrulax as gx\n"
        "gx.hub, gx.sampling.min_p\n"
        "assert 'garrulax.flax' not in sys.modules and 'flax.nnx' not in sys.modules\n"
        "import garrulax.flax\n"
        "assert not {'garrulax.flax.linen', 'garrulax.flax.nnx'} & sys.modules.keys()\n"
        "garrulax.flax.linen_module\n"
        "assert 'flax.nnx' not in sys.modules and 'nnx_module' in dir(garrulax.flax)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def example(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["nnx_finetune.py", *map(str, words)])
    runpy.run_path("examples/nnx_finetune.py", run_name="__main__")
    return [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]


@pytest.mark.slow
def test_the_example_learns_and_saves_a_model(tmp_path, monkeypatch, capsys):
    losses = example(monkeypatch, capsys, "--steps", 8, "--out", tmp_path / "model")
    assert losses[-1] < losses[0] - 1
    again = gx.load(tmp_path / "model")
    assert again.tokenizer.vocab == again.config.vocab


@pytest.mark.slow
def test_the_example_goes_on_with_a_model(tmp_path, monkeypatch, capsys):
    first = example(monkeypatch, capsys, "--steps", 100, "--out", tmp_path / "a")
    second = example(monkeypatch, capsys, "--steps", 50, "--model", tmp_path / "a", "--out", tmp_path / "b")
    assert first[0] > 5
    assert second[0] < first[0] - 2
    assert second[-1] < 3
