"""Reinforcement learning: rollouts, the optimum of a bandit in closed form, exact resuming, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHALLOW

from garrulax import align, models
from garrulax.align import objectives, rl, rollouts
from garrulax.align.policy_objectives import on_model, policy_objective, policy_params, policy_specs
from garrulax.models import gpt
from garrulax.train.batches import on_devices
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

ARMS = 8
BANDIT = gpt.Config(layers=1, heads=1, width=8, context=4, vocab=ARMS, bos=None, eos=None)


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    pass


@pytest.mark.parametrize(
    "family", ["llama", "glm", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt", "chatglm"))]
)
def test_log_probabilities_of_sampling_are_those_of_training(family):
    config = SHALLOW[family]
    params = models.init(config, jax.random.key(0))
    given = [[5, 7, 9, 11, 2], [3, 4], [8]]
    prompts = rollouts.Prompts(given, config, None, limit=6)
    ends = [1]
    roll = rollouts.roll_out(models.unstack(params), config, prompts, [0, 1, 2, 0], seeds=[1, 2, 3, 4], limit=6,
                             end_tokens=ends)  # fmt: skip
    batch = {name: jnp.asarray(x) for name, x in roll.batch.items()}
    difference = align.token_logprobs(params, batch, config) - batch["logprobs"]
    assert float(jnp.max(jnp.abs(difference * batch["weights"]))) < 1e-4
    assert roll.batch["weights"].sum() == sum(len(s.response) for s in roll.samples)
    assert roll.samples[0].response != roll.samples[3].response, "rows of one prompt have noise of their own"
    for sample, row in zip(roll.samples, range(4), strict=True):
        counted = roll.batch["weights"][row] == 1
        assert roll.batch["targets"][row][counted].tolist() == sample.response
        assert sample.ended == (sample.response[-1] == 1)


def trained(method, steps, rewards, beta, *, rows=128, lr=0.05, epochs=1, minibatches=1, **more):
    """The distribution over the arms after training, and that of the reference."""
    reference = models.init(BANDIT, jax.random.key(3))
    reference = jax.tree.map(lambda x: 3 * x, reference)  # not uniform
    settings = Settings(optimizer="adamw", lr=lr, weight_decay=0.0, warmup=0.0, schedule="linear", min_lr_ratio=0.0,
                        batch=rows, window=1, steps=steps, clip=1.0)  # fmt: skip
    chosen = rl.PolicySettings(method, group=rows, limit=1, beta=beta, epochs=epochs, minibatches=minibatches, **more)
    prompts = rollouts.Prompts([[0]], BANDIT, None, 1)
    made = rl.PolicyRollouts(
        prompts, lambda samples: [rewards[s.response[0]] for s in samples], BANDIT, chosen, rows, 0,
        reference=reference, end_tokens=(),
    )  # fmt: skip
    values = method == "ppo"
    specs = policy_specs(BANDIT, values=values)
    optimizer = make_optimizer(settings, specs)
    params = policy_params(reference, BANDIT, beta, values=values, key=jax.random.key(1))
    state = init_state(BANDIT, optimizer, 0, params=params, specs=specs)
    update = make_train_step(BANDIT, settings, optimizer, policy_objective(method, beta=beta))
    for step in range(steps):
        state, batch, metrics = made(state, step, state.params)
        if metrics:
            assert metrics["sampler_difference"] < 1e-4
        state, seen = update(state, on_devices(batch, None, 1))
        if step == 0:
            np.testing.assert_allclose(seen["extra"]["greatest_ratio"], 1, atol=1e-4)

    def arms(params):
        logits, _ = models.forward(params, jnp.zeros((1, 1), jnp.int32), BANDIT)
        return np.asarray(jax.nn.softmax(logits[0, 0].astype(jnp.float32)), np.float64)

    return arms({k: v for k, v in state.params.items() if k not in ("value", "kl_coefficient")}), arms(reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_a_bandit_reaches_its_optimum_in_closed_form(method):
    rewards = np.random.default_rng(0).normal(size=ARMS)
    found, reference = trained(method, 400, rewards, 0.5)
    optimum = reference * np.exp(rewards / 0.5)
    optimum /= optimum.sum()
    assert 0.5 * np.abs(reference - optimum).sum() > 0.3
    assert 0.5 * np.abs(found - optimum).sum() < 0.01


def test_dpo_reaches_the_same_optimum():
    rewards = np.random.default_rng(0).normal(size=ARMS)
    reference = jnp.log(jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(ARMS)), jnp.float32))
    chosen, rejected = np.meshgrid(np.arange(ARMS), np.arange(ARMS), indexing="ij")
    probability = 1 / (1 + np.exp(rewards[rejected] - rewards[chosen]))  # Bradley-Terry, exact

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        losses = align.dpo(logp[chosen], logp[rejected], reference[chosen], reference[rejected], beta=0.5)
        return jnp.sum(losses * probability)

    logits, gradient = reference, jax.jit(jax.grad(loss))
    for _ in range(2000):
        logits = logits - 0.3 * gradient(logits)
    optimum = np.exp(np.asarray(reference, np.float64) + rewards / 0.5)
    optimum /= optimum.sum()
    assert 0.5 * np.abs(np.asarray(jax.nn.softmax(logits)) - optimum).sum() < 1e-4


@pytest.mark.parametrize("method", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_training_moves_towards_the_reward(method):
    rewards = np.zeros(ARMS)
    rewards[3] = 1
    found, reference = trained(method, 24, rewards, 0.0, rows=32, epochs=2, minibatches=2, missing_end=None)
    assert found[3] > reference[3] + 0.1


def test_ptx_adds_the_gradient_of_text():
    config = dataclasses.replace(BANDIT, context=8)
    params = policy_params(models.init(config, jax.random.key(0)), config, 0.1, values=False, key=jax.random.key(1))
    draw = np.random.default_rng(0)
    text = {k: jnp.asarray(draw.integers(0, ARMS, (2, 6)), jnp.int32) for k in ("tokens", "targets")}
    text["weights"] = jnp.ones((2, 6))
    prompts = rollouts.Prompts([[0]], config, None, 2)
    made = rl.PolicyRollouts(prompts, lambda samples: [float(s.response[0]) for s in samples], config,
                             rl.PolicySettings(group=4, limit=2), 4, 0, text=lambda _: text, end_tokens=())  # fmt: skip
    settings = Settings(optimizer="adamw", batch=4, window=1, steps=4)
    state = init_state(config, make_optimizer(settings, policy_specs(config, values=False)), 0, params=params,
                       specs=policy_specs(config, values=False))  # fmt: skip
    _, batch, _ = made(state, 0, state.params)
    batch = jax.tree.map(jnp.asarray, batch)
    alone, text_loss = policy_objective("dr_grpo", limit=2), on_model(causal_lm)
    of_policy = {k[2:]: v for k, v in batch.items() if k.startswith("a/")}

    @jax.jit
    def gradients(weight):
        asked = (objectives.mixed(alone, text_loss, weight), batch), (alone, of_policy), (text_loss, text)
        return [jax.grad(lambda p, one=one, of=of: one(p, of, config)[0])(params) for one, of in asked]

    for x, a, b in zip(*map(jax.tree.leaves, gradients(27.8)), strict=True):
        np.testing.assert_allclose(x, a + 27.8 * b, rtol=1e-4, atol=1e-5)
    for x, a, _ in zip(*map(jax.tree.leaves, gradients(0.0)), strict=True):
        np.testing.assert_allclose(x, a, rtol=1e-5, atol=1e-7)


def test_rewards_that_cannot_be_used():
    prompts = rollouts.Prompts([[0]], BANDIT, None, 1)
    samples = [rollouts.Sampled([0], [1], "", True, [0])] * 4

    def scored(values, **more):
        settings = rl.PolicySettings(**{"group": 4, "limit": 1, **more})
        return rl.PolicyRollouts(prompts, lambda _: values, BANDIT, settings, 4, 0).scores(samples)

    np.testing.assert_array_equal(scored([1, 2, float("nan"), 4]), [1, 2, np.nan, 4])
    for values, message in (
        ([1, float("inf"), 0, 0], "reward of response 1 is infinite"),
        ([float("nan")] * 4, "all rewards are NaN"),
        ([1, 2], r"gave \(2,\) numbers for 4 responses"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(values)
    for more, message in (
        ({"method": "trpo"}, "method='trpo': choose from ppo, rloo, grpo"),
        ({"group": 1}, "group must be at least 2"),
        ({"beta": -1.0}, "beta=-1.0 must not be negative"),
        ({"beta": 0.1}, "beta=0.1 needs the parameters of a reference"),
        ({"group": 3}, "is no multiple of group=3"),
    ):
        with pytest.raises(ValueError, match=message):
            scored([0] * 4, **more)
