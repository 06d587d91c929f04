import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import garrulax as gx
from garrulax import models
from garrulax.core.sharding import make_mesh
from garrulax.train import step as step_
from garrulax.train.batches import on_devices
from garrulax.train.guard import first_guard
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import abstract_state, init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = models.gpt.Config(vocab=48, context=8, width=16, layers=2, heads=4)
objective = jax.jit(causal_lm, static_argnums=2)
SETTINGS = Settings(optimizer="adamw", schedule="linear", warmup=0.0, steps=10, clip=0.0, eps=1e-3)


def host_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 48, (rows, 9)).astype(np.int32)
    weights = rng.random((rows, 8)) < np.linspace(0.1, 1, rows)[:, None]  # micro-batches of very different weight
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights.astype(np.float32)}


@functools.cache
def params():
    return jax.tree.map(np.asarray, gx.init(CONFIG, jax.random.key(0)))


@functools.cache
def machine(settings, mesh=None):
    optimizer = make_optimizer(settings, models.gpt.parameters(CONFIG))
    return optimizer, step_.make_train_step(CONFIG, settings, optimizer, causal_lm)


def one_step(settings=SETTINGS, batch=None, micro=1, steps=1, mesh=None):
    optimizer, step = machine(settings, mesh)
    state = init_state(CONFIG, optimizer, 0, mesh=mesh, params=params())
    for i in range(steps):
        state, metrics = step(state, on_devices(batch or host_batch(seed=i), mesh, micro))
    return state, metrics


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


def test_accumulation_is_one_large_batch():
    one, metrics = one_step()
    four, accumulated = one_step(micro=4)
    assert distance(one.params, four.params) < 1e-6
    for name in ("loss", "grad_norm", "tokens", "lr"):
        np.testing.assert_allclose(accumulated[name], metrics[name], rtol=1e-5)
    # The mean of the micro-batches' means is another number: the test would see the common mistake.
    b = host_batch()
    means = [objective(one.params, {k: v[i : i + 2] for k, v in b.items()}, CONFIG)[0] for i in range(0, 8, 2)]
    assert abs(np.mean(means) - objective(one.params, b, CONFIG)[0]) > 1e-3


def test_metrics_of_a_step():
    b = host_batch()
    gradients = jax.jit(jax.grad(lambda p: causal_lm(p, b, CONFIG)[0]))(params())
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in map(np.asarray, jax.tree.leaves(gradients))))
    state, metrics = one_step(batch=b)
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    flat = np.concatenate([np.reshape(g, (2, -1)) for g in jax.tree.leaves(gradients["blocks"])], axis=1)
    np.testing.assert_allclose(metrics["grad_norms"]["blocks"], np.linalg.norm(flat, axis=1), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norms"]["tokens"], np.linalg.norm(gradients["tokens"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], objective(params(), b, CONFIG)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["lr"], 1e-3)
    assert metrics["tokens"] == b["weights"].sum()
    assert one_step(steps=3)[1]["lr"] == pytest.approx(1e-3 * 0.8 + 1e-4 * 0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "micro"),
    [("fsdp=2,tensor=2,sequence=2", 2), pytest.param("pipeline=2,fsdp=2,tensor=2", 1, marks=pytest.mark.slow)],
)
def test_a_step_on_texts_in_parts_is_a_step(mesh, micro):
    expected, metrics = one_step(micro=micro)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        state, found = one_step(micro=micro, mesh=mesh)
    assert distance(state.params, expected.params) < 1e-6
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize(("mesh", "micro"), [pytest.param(None, 1, marks=pytest.mark.slow), ("fsdp=4,tensor=2", 2)])
def test_a_step_that_is_not_finite_changes_nothing(mesh, micro):
    bad = host_batch()
    bad["weights"][3, 2] = np.nan
    settings = dataclasses.replace(SETTINGS, optimizer="muon")
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        mesh = make_mesh(mesh) if mesh else None
        optimizer, step = machine(settings, mesh)
        state = init_state(CONFIG, optimizer, 0, mesh=mesh, params=params())
        state, good = step(state, on_devices(host_batch(), mesh, micro))
        before = jax.tree.map(np.array, (state.step, state.params, state.opt_state))
        state, metrics = step(state, on_devices(bad, mesh, micro))
    assert good["finite"]
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, (state.step, state.params, state.opt_state), before)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    plain, exact = one_step(steps=3)
    half, metrics = one_step(dataclasses.replace(SETTINGS, precision="bfloat16"), steps=3)
    assert {p.dtype for p in jax.tree.leaves((half.params, half.opt_state[1][0].mu))} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] != exact["loss"]
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2e-2)
    assert distance(plain.params, half.params) < 4e-3


@pytest.mark.parametrize("change", [{"remat": "full"}, {"unroll": False}])
def test_how_the_step_computes_does_not_change_what(change):
    expected, _ = one_step()
    got, _ = one_step(dataclasses.replace(SETTINGS, **change))
    assert distance(expected.params, got.params) < 1e-5


def test_dropout_differs_from_step_to_step_and_is_repeated_by_the_seed():
    settings = dataclasses.replace(SETTINGS, dropout=True, lr=0.0, weight_decay=0.0)
    b = host_batch()
    losses = [float(one_step(settings, batch=b, steps=n)[1]["loss"]) for n in (1, 2, 2)]
    assert losses[0] != losses[1] == losses[2]
    # Two micro-batches of the same rows have other masks: their mean is not the loss of one of them.
    twice = {k: np.concatenate([v, v]) for k, v in b.items()}
    assert float(one_step(settings, batch=twice, micro=2)[1]["loss"]) != losses[0]


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_state_is_born_sharded_and_stays_so(optimizer):
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    single, _ = one_step(settings, steps=2, micro=2)
    mesh = make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        target = abstract_state(CONFIG, machine(settings, mesh)[0], mesh=mesh)
        fresh = init_state(CONFIG, machine(settings, mesh)[0], 0, mesh=mesh)
        state, _ = one_step(settings, steps=2, micro=2, mesh=mesh)
    for s in (fresh, state):
        jax.tree.map(
            lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim) or pytest.fail(f"{x.sharding}"), s, target
        )
    sharded = [x for x in jax.tree.leaves(state.opt_state) if x.ndim and not x.sharding.is_fully_replicated]
    assert sum(x.size for x in sharded) > 0.9 * sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert distance(single.params, state.params) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_average_and_guard_are_sharded_like_the_rest(optimizer):
    """On a mesh a step with a guard, an average and smaller rates below is the step of one device."""
    settings = dataclasses.replace(
        SETTINGS,
        optimizer=optimizer,
        lr=1e-3,
        ema=0.9,
        skip_steps="spikes",
        layer_decay=0.5,
        z_loss=1e-3,
        embedding_shrink=0.1,
    )
    states = []
    for axes in (None, "fsdp=4,tensor=2"):
        mesh = make_mesh(axes) if axes else None
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            update, step = machine(settings, mesh)
            extra = {"average": True, "guard": first_guard(settings)}
            state = init_state(CONFIG, update, 0, mesh=mesh, params=params(), **extra)
            for i in range(3):
                bad = host_batch(seed=i)
                bad["weights"][0, 0] = np.nan if i == 1 else 1
                state, _ = step(state, on_devices(bad, mesh, 2))
            target = abstract_state(CONFIG, update, mesh=mesh, **extra)
            same = jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), state, target)
            assert jax.tree.all(same)
        states.append(state)
    assert (int(state.step), int(state.guard.skipped)) == (3, 1)
    for part in ("ema", "params"):
        one, several = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(s, part))]) for s in states)
        # Lion takes the sign of a gradient: where that is 0 up to rounding, as for the bias of keys, it is any.
        assert np.mean(np.abs(one - several) > 5e-6) <= (0.005 if optimizer == "lion" else 0)


def test_nearest_rounding_is_that_of_the_dtype():
    new, old = {"a": jnp.array([1.003, -2.1], jnp.float32)}, {"a": jnp.zeros(2, jnp.bfloat16)}
    rounded = step_._rounded(new, old, jax.random.key(0), "nearest")["a"]
    np.testing.assert_array_equal(rounded, new["a"].astype(jnp.bfloat16))
