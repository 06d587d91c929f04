"""Every alignment objective on eight devices has the loss and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import CONFIGS

from garrulax import align, models
from garrulax.align import neftune as noise
from garrulax.align import objectives
from garrulax.align.comparisons import NO_ANSWER
from garrulax.align.policy_objectives import on_model, policy_objective, policy_params, policy_specs
from garrulax.core import sharding, spec
from garrulax.models import reward
from garrulax.train.batches import on_devices
from garrulax.train.objectives import causal_lm

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG, B, T = CONFIGS["llama"], 8, 12


def rows(*shape):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, CONFIG.vocab, (*shape, T + 1)).astype(np.int32)
    lengths = draw.integers(4, T + 1, (*shape, 1))
    return {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": ((np.arange(T) >= 2) & (np.arange(T) < lengths)).astype(np.float32),
    }


def pairs():
    return {**rows(B, 2), "reference": np.random.default_rng(1).normal(-20, 2, (B, 2)).astype(np.float32)}


def labelled():
    return {**pairs(), "desirable": np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32)}


def packed():
    """Two documents a row, and a place of padding."""
    segment = np.repeat(np.array([[0] * 5 + [1] * (T - 6) + [-1]], np.int32), B, axis=0)
    positions = np.concatenate([np.arange(5), np.arange(T - 5)]).astype(np.int32)[None].repeat(B, axis=0)
    made = rows(B)
    weights = made["weights"] * (segment >= 0)
    return {**made, "weights": weights.astype(np.float32), "segment": segment, "positions": positions}


def both(first, second):
    return {f"a/{k}": v for k, v in first.items()} | {f"b/{k}": v for k, v in second.items()}


def rankings():
    rank = np.tile(np.array([0, 1, NO_ANSWER], np.int32), (B, 1))
    made = rows(B, 3)
    return {"tokens": made["tokens"], "length": np.full((B, 3), 7, np.int32), "rank": rank}


def rollout(per_token):
    draw = np.random.default_rng(2)
    shape = (B, T) if per_token else (B,)
    more = {"advantages": draw.normal(size=shape).astype(np.float32)}
    if per_token:
        more |= {name: draw.normal(size=shape).astype(np.float32) for name in ("values", "returns")}
    for name in ("logprobs", "reference"):
        more[name] = draw.normal(-5, 0.1, (B, T)).astype(np.float32)
    return {**rows(B), **more}


def with_reward(params):
    return reward.add_reward_head(params, CONFIG, jax.random.key(2))


def policy(values):
    def changed(params):
        made = policy_params(params, CONFIG, 0.1, values=values, key=jax.random.key(2))
        return {**made, "value": jax.tree.map(lambda x: x + 0.1, made["value"])} if values else made

    return changed, policy_specs(CONFIG, values=values)


def of_tokens(penalty):
    return objectives.token_penalty_objective(penalty, 0.5)


def with_noise(params, batch, config):
    return noise.neftune(causal_lm, 5.0)(params, batch, config, jax.random.key(3))


@functools.cache
def old():
    """Another model, whose arrays are constants of the program, whole on every device."""
    with jax.ensure_compile_time_eval():  # the objectives ask for it while they are compiled
        return jax.tree.map(lambda x: np.asarray(x, np.float64), models.init(CONFIG, jax.random.key(9)))


def from_a_teacher(params, batch, config, **knobs):
    return align.distillation_objective(old(), **knobs)(params, batch, config)


def near_the_old(params, batch, config):
    return objectives.penalised(causal_lm, lambda p: align.ewc_penalty(p, old(), weight=0.1))(params, batch, config)


SAME = (lambda params: params, models.parameters(CONFIG))
CASES = {
    "sft": (causal_lm, packed, *SAME),
    "neftune": (with_noise, packed, *SAME),
    "kto": (objectives.kto_objective(desirable_weight=1.3), labelled, *SAME),
    "dpo": (objectives.pair_objective("dpo"), pairs, *SAME),
    "ipo": (objectives.pair_objective("ipo"), pairs, *SAME),
    "orpo": (objectives.pair_objective("orpo"), pairs, *SAME),
    "simpo": (objectives.pair_objective("simpo"), pairs, *SAME),
    "reward": (objectives.reward_objective(centring=0.1), rankings, with_reward, reward.reward_specs(CONFIG)),
    "ppo": (policy_objective("ppo"), lambda: rollout(True), *policy(True)),
    **{
        name: (policy_objective(name, beta=0.0 if name == "rloo" else 0.1), lambda: rollout(False), *policy(False))
        for name in ("rloo", "grpo", "dr_grpo", "dapo", "gspo")
    },
    "ppo-ptx": (
        objectives.mixed(policy_objective("ppo"), on_model(causal_lm), 0.3), lambda: both(rollout(True), packed()),
        *policy(True),
    ),
    "unlikelihood": (of_tokens(align.unlikelihood), packed, *SAME),
    "scalegrad": (
        of_tokens(lambda logits, targets, weights, segment: align.scalegrad(logits, targets, segment=segment)),
        packed, *SAME,
    ),
    "ewc": (near_the_old, packed, *SAME),
    # On given text with the forward KL, and on text of the student, which has log-probabilities too, with the reverse.
    "distillation": (functools.partial(from_a_teacher, temperature=2.0, nll_weight=0.5), packed, *SAME),
    "distillation on-policy": (functools.partial(from_a_teacher, beta=1.0), lambda: rollout(False), *SAME),
    "distillation between": (functools.partial(from_a_teacher, beta=0.3), lambda: rows(B), *SAME),
}  # fmt: skip
QUICK = ("ppo",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_an_objective_on_eight_devices(name):
    objective, batch, changed, specs = CASES[name]
    params = changed(models.init(CONFIG, jax.random.key(0)))
    batch = batch()

    def graded(params, batch):
        return jax.value_and_grad(lambda p: objective(p, batch, CONFIG)[0])(params)

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        loss, gradients = jax.jit(graded)(params, jax.tree.map(jnp.asarray, batch))
        mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.shardings(specs, mesh, "fsdp+tp"))
            found, on_mesh = jax.jit(graded)(placed, on_devices(batch, mesh))
    np.testing.assert_allclose(found, loss, rtol=1e-10)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    for path, gradient in spec.named_leaves(gradients).items():
        other = spec.named_leaves(on_mesh)[path]
        np.testing.assert_allclose(other, gradient, rtol=1e-9, atol=1e-10 * largest, err_msg=path)
